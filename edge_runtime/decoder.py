"""Embeddings → logits → tokens: the Qwen3 decoder, run by llama.cpp through its low-level API.

Several sequences share one KV cache, and one call computes parts of any of them. A prompt enters as one stream of
embeddings, text and visual tokens alike, cut only by chunk size: cutting it at every picture, as llama.cpp's own
multimodal helpers do, costs a decode call per separator token. Knows nothing of text or pictures: what stands at a
position is a key, and equal keys mean equal embeddings.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from edge_runtime import llama
from edge_runtime.adapters import Adapters
from edge_runtime.config import decoder_config
from edge_runtime.errors import MessageError, ModelFileError, PromptTooLongError
from edge_runtime.kv_state import KVRows, UnknownState, build, parse
from edge_runtime.weights import Float32, GGUFFile

CHUNK_TOKENS = 512
"""Prompt tokens per call of llama.cpp; also its micro-batch, so that one call is one pass over the weights."""
DEFAULT_CONTEXT = 8192
N_SEQUENCES = 8
KV_TYPES = ("f16", "q8_0", "q4_0")
FULL, ABORTED = 1, 2  # llama_decode: no room in the KV cache; the abort callback answered true


class Cancelled(Exception):  # noqa: N818 - a request's end, not an error
    """The request was cancelled; raised on the inference thread only."""


class CacheFull(Exception):  # noqa: N818 - answered by making room
    """The KV cache has no room for what was to be computed; nothing has changed."""


class Part(NamedTuple):
    """What one call appends to one sequence."""

    sequence: int
    keys: Sequence[Hashable]
    """What stands at the new positions; token ids where there are no embeddings."""
    embeddings: Float32 | None = None
    """ndarray [shape=(n, hidden), float32]"""
    wants_logits: bool = True
    """Of the last position."""


@dataclass(frozen=True)
class DecoderOptions:
    """How the decoder is set up.

    `exact` takes a float32 KV cache and no flash attention: the default float16 cache alone moves logits by 1e-3 to
    1e-2.
    """

    n_ctx: int = DEFAULT_CONTEXT
    exact: bool = False
    n_threads: int = 1
    n_sequences: int = N_SEQUENCES
    """Requests that can be computed side by side."""
    kv_type: str | None = None
    """One of `KV_TYPES`; None takes the default of the arithmetic."""
    n_ubatch: int = CHUNK_TOKENS
    """Positions that llama.cpp works on at a time inside a call."""
    repack: bool = False
    """Copy the weights into another order when loading; needs their size in memory again."""
    adapters: Mapping[str, str | Path] = field(default_factory=dict)
    """Name to LoRA file."""


def common_beginning(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Number of positions at which two sequences begin alike."""
    limit = min(len(one), len(other))
    return next((i for i in range(limit) if one[i] != other[i]), limit)


def choose_kv_type(file: GGUFFile, asked: str | None, *, exact: bool) -> str:
    """Type of the KV cache: what was asked for, checked; float32 for exact arithmetic, float16 otherwise.

    Raises
    ------
    MessageError
        When the type is unknown, or does not go with this model or with exact arithmetic.
    """
    default = "f32" if exact else "f16"
    chosen = asked or default
    if chosen not in (KV_TYPES if not exact else (default,)):
        expected = "'f32', which exact arithmetic needs" if exact else f"one of {', '.join(KV_TYPES)}"
        raise MessageError(f"The KV type is {chosen!r}; expected {expected}.")
    heads = file.get("qwen3.attention.head_count", int, 1)
    width = file.get("qwen3.attention.key_length", int, file.get("qwen3.embedding_length", int) // heads)
    block = GGML_QUANT_SIZES[GGMLQuantizationType[chosen.upper()]][0]
    if width % block:
        raise MessageError(
            f"The KV type is {chosen!r}, which stores blocks of {block} numbers, but heads of {file.path.name} have "
            f"{width}; expected f16 for this model."
        )
    return chosen


def kv_bytes(kv_type: str, n: int) -> int:
    """Bytes of `n` numbers in a KV cache, whole blocks."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kv_type.upper()]]
    return int(n // block * size)


class Decoder:
    """One decoder file with one KV cache that several sequences share.

    Parameters
    ----------
    file : its path, or the file as it was read before.

    Raises
    ------
    ModelFileError
        When the file is damaged or llama.cpp refuses it.
    """

    def __init__(self, file: str | Path | GGUFFile, options: DecoderOptions) -> None:
        self.file = file if isinstance(file, GGUFFile) else GGUFFile(file)
        self.config = decoder_config(self.file)
        # Every use of these may come after close(), so they must exist before anything can fail.
        self._model = self._context = None
        self._batches: list[Any] = []
        self._cancelled: Callable[[], bool] = lambda: False
        self.n_sequences = options.n_sequences
        # One more than requests can have: for `prefill` and `decode`, and between `read_rows` and `append_rows`.
        self._held: list[list[Hashable]] = [[] for _ in range(options.n_sequences + 1)]
        self._adapters: Adapters | None = None
        self._lib = lib = llama.library()
        self.kv_type = choose_kv_type(self.file, options.kv_type, exact=options.exact)
        self._model = self._load_model(repack=options.repack)
        try:
            self._adapters = Adapters(self._model, self.file, options.adapters)
        except BaseException:
            self.close()
            raise
        self.n_ctx = min(options.n_ctx, self.config.context_length)
        params = lib.llama_context_default_params()
        params.n_seq_max = params.n_outputs_max = options.n_sequences + 1  # one row of logits per sequence and call
        params.n_ctx = max(self.n_ctx, params.n_seq_max)  # with fewer cells than sequences llama.cpp aborts
        params.n_batch, params.n_ubatch = CHUNK_TOKENS, min(options.n_ubatch, CHUNK_TOKENS)
        params.kv_unified = True  # what is free belongs to whoever needs it, and a shared beginning is held once
        params.n_threads = params.n_threads_batch = options.n_threads
        params.type_k = params.type_v = GGMLQuantizationType[self.kv_type.upper()]
        if options.exact:
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        elif self.kv_type != "f16":
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED  # quantised values need it
        self._abort = lib.ggml_abort_callback(lambda _data: self._cancelled())
        params.abort_callback = self._abort
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise ModelFileError(
                f"llama.cpp cannot set up a context of {self.n_ctx} tokens for {self.file.path.name}: "
                f"{llama.last_errors()}; try a smaller --ctx."
            )
        self.chunk = min(CHUNK_TOKENS, lib.llama_n_batch(self._context))
        """Most positions of a call: fewer than `CHUNK_TOKENS` in a small context, where llama.cpp aborts at more."""
        self._embedding_batch = lib.llama_batch_init(CHUNK_TOKENS, self.config.hidden, 1)
        self._token_batch = lib.llama_batch_init(CHUNK_TOKENS, 0, 1)
        self._batches += [self._embedding_batch, self._token_batch]

    def _load_model(self, *, repack: bool) -> Any:
        lib = self._lib
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP
        # Repacked weights cost 3.6 GB and 15 s of loading at full size, and make prefill slower (2 cores measured).
        params.use_extra_bufts = repack
        with llama.watch_log(lambda line: None):
            model = lib.llama_model_load_from_file(str(self.file.path).encode(), params)
        if not model:
            raise ModelFileError(
                f"llama.cpp refuses {self.file.path.name}: {llama.last_errors()}; convert or download it again."
            )
        return model

    @property
    def adapters(self) -> Adapters:
        """LoRA adapters that `step` can compute with."""
        assert self._adapters is not None
        return self._adapters

    @property
    def context(self) -> Any:
        """llama.cpp's context, for the samplers."""
        return self._context

    def embed(self, ids: npt.NDArray[np.int64]) -> Float32:
        """Rows of the embedding table: ndarray [shape=(n, hidden), float32], dequantised as llama.cpp does."""
        return self.file.rows("token_embd.weight", ids)

    def check_length(self, n_prompt: int) -> None:
        """Refuse a prompt that leaves no room for an answer.

        Raises
        ------
        PromptTooLongError
            With the numbers.
        """
        if n_prompt + 1 > self.n_ctx:
            raise PromptTooLongError(
                f"The prompt has {n_prompt} tokens, but the context holds {self.n_ctx} (the model was trained for "
                f"{self.config.context_length}), one of them for the answer; "
                "use fewer or smaller pictures (--max-slices), less of a video (--packing, --max-frames), a shorter "
                "text, or a larger --ctx."
            )

    def held(self, sequence: int) -> int:
        """Positions of a sequence that are in the KV cache."""
        return len(self._held[sequence])

    def common(self, sequence: int, keys: Sequence[Hashable]) -> int:
        """Length of the beginning that a sequence has in common with `keys`, at most all but the last of them.

        The last one is to be computed again in any case, or there would be no logits.
        """
        return common_beginning([*self._held[sequence]], keys[:-1])  # a copy: other threads may ask for a hint

    def rewind(self, sequence: int, n: int = 0) -> None:
        """Cut a sequence off behind its first `n` positions."""
        # Also when nothing is cut off: an aborted call leaves positions behind that nobody knows of.
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), sequence, n, -1)
        del self._held[sequence][n:]

    def share(self, source: int, sequence: int, n: int) -> None:
        """Make a sequence begin with the first `n` positions of another, which are held once for both."""
        self.rewind(sequence)
        self._lib.llama_memory_seq_cp(self._lib.llama_get_memory(self._context), source, sequence, 0, n)
        self._held[sequence] = self._held[source][:n]

    def read_rows(self, sequence: int, first: int, end: int) -> KVRows:
        """Copy what the KV cache holds of positions `first` to `end` - 1 of a sequence.

        Raises
        ------
        UnknownState
            When llama.cpp saves it in a form that is not known.
        """
        spare, lib = self.n_sequences, self._lib
        self.rewind(spare)
        lib.llama_memory_seq_cp(lib.llama_get_memory(self._context), sequence, spare, first, end)
        try:
            state = np.empty(lib.llama_state_seq_get_size(self._context, spare), np.uint8)
            lib.llama_state_seq_get_data(self._context, _pointer(state), len(state), spare)
        finally:
            self.rewind(spare)
        rows = parse(state)
        if len(rows) != end - first:
            raise UnknownState(f"{len(rows)} cells instead of {end - first}")
        return rows

    def append_rows(self, sequence: int, keys: Sequence[Hashable], rows: KVRows) -> None:
        """Append positions that were computed before, or elsewhere; the other way to fill a sequence than `step`.

        Parameters
        ----------
        keys : what stands at the new positions, one for each row.

        Raises
        ------
        CacheFull
            When there is no room, or the rows are of another kind of KV cache; the sequences are as before.
        """
        spare, lib, first = self.n_sequences, self._lib, self.held(sequence)
        state = build(rows, first)
        # Into a sequence of its own: llama.cpp empties the one that it fills.
        self.rewind(spare)
        with llama.watch_log(lambda line: None):
            n_read = lib.llama_state_seq_set_data(self._context, _pointer(state), len(state), spare)
        if n_read != len(state):
            self.rewind(spare)
            raise CacheFull(llama.last_errors())
        lib.llama_memory_seq_cp(lib.llama_get_memory(self._context), spare, sequence, first, first + len(rows))
        self.rewind(spare)
        self._held[sequence] += keys

    def step(
        self,
        parts: Sequence[Part],
        cancelled: Callable[[], bool] = lambda: False,
        adapter: str | None = None,
    ) -> list[int]:
        """Append parts to their sequences in one call; at most `chunk` positions together.

        Parameters
        ----------
        cancelled : asked often, from inside llama.cpp; whether to leave it and forget what the call has done.
        adapter : name of the LoRA adapter to compute with.

        Returns
        -------
        rows : for each part the row of its last position, which asks for its logits.

        Raises
        ------
        Cancelled
            When `cancelled` answered true before the call was done; the sequences are as before.
        CacheFull
            When there is no room; the sequences are as before.
        """
        batch, rows, n = self._filled_batch(parts), [], 0
        for part in parts:
            for i in range(len(part.keys)):
                batch.pos[n + i] = self.held(part.sequence) + i
                batch.n_seq_id[n + i] = 1
                batch.seq_id[n + i][0] = part.sequence
                batch.logits[n + i] = False
            n += len(part.keys)
            batch.logits[n - 1] = part.wants_logits
            rows.append(n - 1)
        batch.n_tokens = n
        self.adapters.use(self._context, adapter)
        self._cancelled = cancelled
        try:
            with llama.watch_log(lambda line: None):
                status = self._lib.llama_decode(self._context, batch)
        finally:
            self._cancelled = lambda: False
        if status != 0:
            for part in parts:
                self.rewind(part.sequence, self.held(part.sequence))
            if status == FULL:
                raise CacheFull
            if status == ABORTED:
                raise Cancelled
            raise ModelFileError(
                f"llama.cpp failed to decode (status {status}): {llama.last_errors()}; the model file may be "
                "damaged: download it again."
            )
        for part in parts:
            self._held[part.sequence] += part.keys
        return rows

    def _filled_batch(self, parts: Sequence[Part]) -> Any:
        """Batch with the inputs of all parts: token ids if nothing else is among them, else embeddings."""
        if all(part.embeddings is None for part in parts):
            for i, token_id in enumerate(key for part in parts for key in part.keys):
                self._token_batch.token[i] = token_id
            return self._token_batch
        rows = [
            self.embed(np.asarray(part.keys, np.int64)) if part.embeddings is None else part.embeddings
            for part in parts
        ]
        embeddings = np.ascontiguousarray(np.concatenate(rows), np.float32)
        ctypes.memmove(self._embedding_batch.embd, embeddings.ctypes.data, embeddings.nbytes)
        return self._embedding_batch

    def prefill(self, embeddings: Float32, adapter: str | None = None) -> None:
        """Compute embeddings in a sequence of their own, outside any request; `decode` goes on with it.

        Parameters
        ----------
        embeddings : ndarray [shape=(n, hidden), float32]
        """
        self.check_length(len(embeddings))
        self.rewind(self.n_sequences)
        for start in range(0, len(embeddings), CHUNK_TOKENS):
            chunk = embeddings[start : start + CHUNK_TOKENS]
            self.step([Part(self.n_sequences, [object() for _ in chunk], chunk)], adapter=adapter)

    def decode(self, token_id: int, adapter: str | None = None) -> None:
        """Append one token to what `prefill` began."""
        self.step([Part(self.n_sequences, [token_id])], adapter=adapter)

    def logits(self, row: int = -1) -> Float32:
        """Logits of a row of the last call: ndarray [shape=(vocabulary,), float32], a copy."""
        return self.logits_view(row).copy()

    def logits_view(self, row: int = -1) -> Float32:
        """As `logits`, but llama.cpp's own memory, which the next call overwrites; not to be written to."""
        pointer = self._lib.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, (self.config.vocabulary,))

    def close(self) -> None:
        """Free the model and its context; further calls do nothing."""
        if self._context:
            for batch in self._batches:
                self._lib.llama_batch_free(batch)
            self._lib.llama_free(self._context)
        if self._adapters:
            self._adapters.close()
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None


def _pointer(data: npt.NDArray[np.uint8]) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def embed(decoder: Decoder, ids: npt.NDArray[np.int64], visual: Mapping[tuple[int, int], Float32]) -> Float32:
    """One stream of embeddings: token rows with visual tokens in their places.

    Parameters
    ----------
    ids : ndarray [shape=(n,), int64]
    visual : (first, end) → ndarray [shape=(end - first, hidden), float32]; places may begin before the first id and
        end behind the last.

    Returns
    -------
    embeddings : ndarray [shape=(n, hidden), float32]
    """
    embeddings = np.array(decoder.embed(ids))
    for (first, end), tokens in visual.items():
        inside = slice(max(first, 0), min(end, len(ids)))
        embeddings[inside] = tokens[inside.start - first : inside.stop - first]
    return embeddings
