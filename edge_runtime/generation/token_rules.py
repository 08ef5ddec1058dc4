"""Which tokens an answer may consist of, and which end it, apart from what the model and its template say.

What enters: the options of one request. What leaves: for every place the token ids among which is chosen. Knows
nothing of text. The words are vLLM's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_runtime.errors import MessageError
from edge_runtime.prompt.tokenizer import Tokenizer

MOST_IDS = 4096
"""Of one list."""


@dataclass(frozen=True)
class TokenRules:
    """Rules of one request."""

    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the answer, besides the model's own; they are not part of it."""
    min_tokens: int = 0
    """Tokens before which nothing ends the answer."""
    ignore_eos: bool = False
    """Whether the model's own end tokens are never chosen."""
    allowed: tuple[int, ...] | None = None
    """The only tokens that may be chosen."""

    def candidates(self, n_tokens: int, n_rows: int, ends: frozenset[int]) -> npt.NDArray[np.int64] | None:
        """Token ids among which the next token is chosen: ndarray [shape=(n,), int64]; None: all.

        Parameters
        ----------
        n_tokens : tokens that the answer has.
        n_rows : rows of the logits.
        ends : the model's end tokens.
        """
        shut = ends if self.ignore_eos else frozenset()
        if n_tokens < self.min_tokens:
            shut = ends | self.stop_ids
        if self.allowed is None and not shut:
            return None
        ids = np.arange(n_rows) if self.allowed is None else np.array(self.allowed, np.int64)
        return ids[~np.isin(ids, [*shut])] if shut else ids


def choose_rules(
    stop_token_ids: Any,
    min_tokens: Any,
    ignore_eos: Any,
    allowed_token_ids: Any,
    *,
    tokenizer: Tokenizer,
    is_bound: bool,
    has_stops: bool,
) -> TokenRules | None:
    """Check the rules of a request; None where there are none.

    Parameters
    ----------
    is_bound : whether a form or a search already decides what may come and where the answer ends.
    has_stops : whether there are stop strings.

    Raises
    ------
    MessageError
        Naming the option that has the wrong form, or contradicts another.
    """
    n_vocab, ends = len(tokenizer.tokens), tokenizer.stop_ids
    stop_ids = frozenset(_checked("stop_token_ids", stop_token_ids, n_vocab))
    if type(min_tokens) is not int or min_tokens < 0:
        raise MessageError(f"min_tokens is {min_tokens!r}; expected a whole number from 0.")
    if type(ignore_eos) is not bool:
        raise MessageError(f"ignore_eos is {ignore_eos!r}; expected True or False.")
    allowed = None if allowed_token_ids is None else tuple(_checked("allowed_token_ids", allowed_token_ids, n_vocab))
    if allowed is not None and not set(allowed) - ends - stop_ids:
        raise MessageError("allowed_token_ids leaves no token but those that end an answer; expected others, too.")
    given = {
        "stop_token_ids": bool(stop_ids - ends),  # the model's own are what ends a form, too
        "min_tokens": min_tokens > 0,
        "ignore_eos": ignore_eos,
        "allowed_token_ids": allowed is not None,
    }
    if is_bound and any(given.values()):
        raise MessageError(
            f"{next(name for name, is_given in given.items() if is_given)} was given together with a form of the "
            "answer or a beam search, which decide themselves what may come and where it ends; leave one of them out."
        )
    if min_tokens and has_stops:
        raise MessageError(
            "min_tokens was given together with stop strings, which end the answer wherever they are met; leave one "
            "of them out."
        )
    if not any(given.values()):
        return None
    return TokenRules(stop_ids, min_tokens, ignore_eos, allowed)


def _checked(name: str, ids: Any, n_vocab: int) -> Sequence[int]:
    if not isinstance(ids, list | tuple) or len(ids) > MOST_IDS:
        raise MessageError(f"{name} is no list of at most {MOST_IDS} token ids.")
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < n_vocab:
            raise MessageError(f"{name} has the token id {token_id!r}; expected a number from 0 to {n_vocab - 1}.")
    return ids
