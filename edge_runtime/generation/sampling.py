"""Logits → the next token: the official sampling by default, or greedy, through llama.cpp's samplers.

Source: `chat()` of MiniCPM-V 4.5 on transformers. Order there: bias, repetition penalty over generated tokens,
temperature, top-k, top-p, min-p, typical. Beam search is in `beam_search`.
"""

from __future__ import annotations

import ctypes
import math
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.decoder import llama_cpp as llama

if TYPE_CHECKING:
    from edge_runtime.decoder.decoder import Decoder

MAX_NEW_TOKENS = 2048  # official default
OFFICIAL_BEAMS = 3
LARGEST_BIAS = 100.0
MAX_SEED = 2**32 - 1  # llama.cpp takes this value to mean "choose at random"


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen; the official values come from `official`, `option_checks` checks them."""

    temperature: float
    """0: always the most probable token."""
    top_k: int = 0
    """Keep this many tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most probable tokens until their probabilities sum to this."""
    repetition_penalty: float = 1.0
    """Divides (multiplies, if negative) the logits of tokens already generated."""
    min_p: float = 0.0
    """Drop tokens less probable than this share of the most probable one."""
    typical_p: float = 1.0
    """Keep the tokens of most typical surprise until their probabilities sum to this (Meister et al., 2022)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens already generated."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens already generated, once per occurrence."""
    seed: int | None = None
    """The same seed repeats an answer; None: a random one.

    Draws repeat exactly, logits as far as llama.cpp repeats them. The same request alone in a fresh process gives
    the same bits. After a reused prefix, or in a batch with other requests, float32 sums are added in another order:
    with a float32 decoder and `exact=True` that changed no answer, but with quantised weights log probabilities move
    by up to 0.1, and a draw that close to the border between two tokens can change.
    """
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their logits before everything else."""

    @classmethod
    def official(cls, thinking: bool) -> SamplingOptions:
        """Defaults of the official `chat()`.

        With thinking, it sets only the temperature; 50 is transformers' top_k.
        """
        if thinking:
            return cls(temperature=0.7, top_k=50)
        return cls(temperature=0.7, top_k=100, top_p=0.8, repetition_penalty=1.03)

    @classmethod
    def official_search(cls) -> SamplingOptions:
        """Defaults of the official `chat(sampling=False)`, a search with `OFFICIAL_BEAMS` beams."""
        return cls(temperature=0.0, repetition_penalty=1.2)

    def numbered(self, i: int) -> SamplingOptions:
        """Options for the i-th of several answers: seed + i, or a random seed."""
        return self if self.seed is None else replace(self, seed=(self.seed + i) % MAX_SEED)


GREEDY = SamplingOptions(temperature=0.0)
"""The most probable token, without penalties."""

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama_token_data"""


class Sampler:
    """A chain of llama.cpp's samplers for one answer.

    Parameters
    ----------
    n_ctx : window of the repetition penalty: every generated token fits, so none is forgotten. The sampler never sees
        the prompt, because the official code generates from embeddings.
    """

    def __init__(self, options: SamplingOptions, n_vocab: int, n_ctx: int) -> None:
        lib = llama.library()
        self._lib = lib
        self.seed = secrets.randbelow(MAX_SEED) if options.seed is None else options.seed
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        links = []
        if options.logit_bias:
            biases = (lib.llama_logit_bias * len(options.logit_bias))(*options.logit_bias)
            links.append(lib.llama_sampler_init_logit_bias(n_vocab, len(biases), biases))
        penalties = options.repetition_penalty, options.frequency_penalty, options.presence_penalty
        if penalties != (1.0, 0.0, 0.0):
            links.append(lib.llama_sampler_init_penalties(n_vocab, n_ctx, *penalties))
        if options.temperature == 0:
            links.append(lib.llama_sampler_init_greedy())
        else:
            links.append(lib.llama_sampler_init_temp(options.temperature))
            if options.top_k:
                links.append(lib.llama_sampler_init_top_k(options.top_k))
            if options.top_p < 1.0:
                links.append(lib.llama_sampler_init_top_p(options.top_p, 1))
            if options.min_p > 0.0:
                links.append(lib.llama_sampler_init_min_p(options.min_p, 1))
            if options.typical_p < 1.0:
                links.append(lib.llama_sampler_init_typical(options.typical_p, 1))
            links.append(lib.llama_sampler_init_dist(self.seed))
        for link in links:
            lib.llama_sampler_chain_add(self._chain, link)

    def sample(self, decoder: Decoder, row: int) -> int:
        """Choose a token from the logits of a row of the last call, and count it for the penalty."""
        if not decoder.is_local(row):
            return int(self._lib.llama_sampler_sample(self._chain, decoder.context, row))
        logits = decoder.logits_view(row)
        token_id = self.choose(np.arange(len(logits)), logits)
        self.accept(token_id)
        return token_id

    def choose(self, ids: np.ndarray[Any, np.dtype[np.int64]], logits: np.ndarray[Any, np.dtype[np.float32]]) -> int:
        """Choose among some tokens only, without counting the choice.

        Parameters
        ----------
        ids : ndarray [shape=(n,), int64], at least one.
        logits : ndarray [shape=(vocabulary,), float32]
        """
        candidates = np.zeros(len(ids), CANDIDATE)
        candidates["id"], candidates["logit"] = ids, logits[ids]
        data = candidates.ctypes.data_as(ctypes.POINTER(self._lib.llama_token_data))
        array = self._lib.llama_token_data_array(data, len(ids), -1, False)
        self._lib.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def accept(self, token_id: int) -> None:
        """Count a token that was not chosen here."""
        self._lib.llama_sampler_accept(self._chain, token_id)

    def close(self) -> None:
        """Free the chain; further calls do nothing."""
        if self._chain is not None:
            self._lib.llama_sampler_free(self._chain)
            self._chain = None


def is_finite(logits: np.ndarray[Any, np.dtype[np.float32]]) -> bool:
    """Whether logits are usable; NaN means damaged weights."""
    return math.isfinite(float(logits.max())) and not bool(np.isnan(logits).any())
