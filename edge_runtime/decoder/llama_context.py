"""llama.cpp's model and context: sequences in one KV cache, one call over chunks of them, rows in and out of it.

Input: embeddings or token ids for any sequences. Output: logits, and rows of keys and values. Sequences share the KV
cache, so a prefix that two of them have in common is held once. Each position is identified by a key, and equal keys
mean equal embeddings; nothing here knows of text, pictures or requests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from edge_runtime.decoder import llama_cpp as llama
from edge_runtime.decoder.adapters import Adapters
from edge_runtime.decoder.kernel_products import new_context, wants_kernels
from edge_runtime.decoder.kv_rows import Bytes, KVRows, UnknownState, build, parse
from edge_runtime.decoder.kv_types import choose_kv_type
from edge_runtime.decoder.options import CHUNK_TOKENS, DecoderOptions
from edge_runtime.decoder.sequence_chunk import Cancelled, SequenceChunk
from edge_runtime.errors import CacheFull, ModelFileError
from edge_runtime.system.bus_errors import watch_memory
from edge_runtime.weights.config import decoder_config
from edge_runtime.weights.gguf_file import Float32, GGUFFile
from edge_runtime.weights.memory_map import Region, release_region, watched

ROWS_AT_A_TIME = 128
"""Positions handed to the KV cache together, which takes a copy of them."""
MAX_SCORED_ROWS = 32
"""Positions of a prompt whose logits are computed in one call, if all are wanted."""
N_HELD = 2
"""Sequences that hold shared prefixes of chats (`cache.shared_prefixes`)."""
FULL, ABORTED = 1, 2  # llama_decode: no free cells in the KV cache; the abort callback returned true


def common_beginning(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Length of the common prefix of two sequences."""
    limit = min(len(one), len(other))
    return next((i for i in range(limit) if one[i] != other[i]), limit)


class _Loaded(NamedTuple):
    model: Any
    region: Region | None
    """Where llama.cpp has mapped the file, if known."""
    unwatch: Callable[[], None]
    """Stops watching that memory."""


def load_model(file: GGUFFile, *, repack: bool) -> _Loaded:
    """Let llama.cpp map a decoder file.

    Raises
    ------
    ModelFileError
        When llama.cpp refuses it.
    """
    lib = llama.library()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    params.load_mode = lib.LLAMA_LOAD_MODE_MMAP
    # Repacked weights cost 3.6 GB and 15 s of loading at full size, and make prefill slower (2 cores measured).
    params.use_extra_bufts = repack
    with llama.watch_log(lambda line: None), watched(file.path) as regions:
        model = lib.llama_model_load_from_file(str(file.path).encode(), params)
    if not model:
        raise ModelFileError(
            f"llama.cpp refuses {file.path.name}: {llama.last_errors()}; convert or download it again."
        )
    if not regions:
        return _Loaded(model, None, lambda: None)
    region = regions[0]
    if "output.weight" in file.tensors:
        # llama.cpp reads the whole file. Of this table, 350 MB in a full-size one, a prompt needs a few rows.
        table = file.tensors["token_embd.weight"]
        release_region(region, table.offset, table.offset + table.n_bytes)
    return _Loaded(model, region, watch_memory(region.begin, region.end - region.begin, file.path))


class _Batches:
    """llama.cpp's two kinds of batch, filled with a call's inputs: token ids, or embeddings of `hidden` numbers."""

    def __init__(self, hidden: int) -> None:
        self._lib = llama.library()
        self._embeddings = self._lib.llama_batch_init(CHUNK_TOKENS, hidden, 1)
        self._tokens = self._lib.llama_batch_init(CHUNK_TOKENS, 0, 1)

    def filled(self, chunks: Sequence[SequenceChunk], embed: Callable[[npt.NDArray[np.int64]], Float32]) -> Any:
        """Batch with the inputs of all chunks: token ids if there is nothing else, otherwise embeddings."""
        if all(chunk.embeddings is None for chunk in chunks):
            for i, token_id in enumerate(key for chunk in chunks for key in chunk.keys):
                self._tokens.token[i] = token_id
            return self._tokens
        rows = [
            embed(np.asarray(chunk.keys, np.int64)) if chunk.embeddings is None else chunk.embeddings
            for chunk in chunks
        ]
        embeddings = np.ascontiguousarray(np.concatenate(rows), np.float32)
        ctypes.memmove(self._embeddings.embd, embeddings.ctypes.data, embeddings.nbytes)
        return self._embeddings

    def free(self) -> None:
        """Free them; do not use them afterwards."""
        self._lib.llama_batch_free(self._embeddings)
        self._lib.llama_batch_free(self._tokens)


class LlamaContext:
    """One decoder file in llama.cpp, with one KV cache that several sequences share.

    Parameters
    ----------
    file : path, or the file if it was already read.

    Raises
    ------
    ModelFileError
        When the file is damaged or llama.cpp refuses it.
    """

    def __init__(self, file: str | Path | GGUFFile, options: DecoderOptions) -> None:
        self.file = file if isinstance(file, GGUFFile) else GGUFFile(file)
        self.config = decoder_config(self.file)
        # All of these may be used after close(), so they must exist before anything can fail.
        self._context: Any = None
        self._batches: _Batches | None = None
        self._adapters: Adapters | None = None
        self._cancelled: Callable[[], bool] = lambda: False
        self.n_sequences = options.n_sequences
        # One more than requests use: for `prefill` and `decode`, and between `read_rows` and `append_rows`.
        # After it those that hold shared prefixes of chats.
        self._held: list[list[Hashable]] = [[] for _ in range(options.n_sequences + 1 + N_HELD)]
        self._lib = lib = llama.library()
        self.kv_type = choose_kv_type(self.file, options.kv_type, exact=options.exact)
        self._model, self._region, self._unwatch = load_model(self.file, repack=options.repack)
        try:
            self._adapters = Adapters(self._model, self.file, options.adapters)
            self.n_ctx = min(options.n_ctx, self.config.context_length)
            self._abort = lib.ggml_abort_callback(lambda _data: self._cancelled())
            with new_context(with_kernels=wants_kernels(self.file, options)) as self.uses_kernels:
                self._context = lib.llama_init_from_model(self._model, self._parameters(options))
        except BaseException:
            self.close()
            raise
        if not self._context:
            self.close()
            raise ModelFileError(
                f"llama.cpp cannot set up a context of {self.n_ctx} tokens for {self.file.path.name}: "
                f"{llama.last_errors()}; try a smaller --ctx."
            )
        self.n_batch: int = min(CHUNK_TOKENS, lib.llama_n_batch(self._context))
        """Maximum positions of a call: below `CHUNK_TOKENS` in a small context, where llama.cpp aborts at more."""
        self._batches = _Batches(self.config.hidden)

    def _parameters(self, options: DecoderOptions) -> Any:
        lib = self._lib
        params = lib.llama_context_default_params()
        params.n_seq_max = len(self._held)
        params.n_outputs_max = params.n_seq_max + MAX_SCORED_ROWS  # one row of logits per sequence, and these
        params.n_ctx = max(self.n_ctx, params.n_seq_max)  # with fewer cells than sequences llama.cpp aborts
        params.n_batch, params.n_ubatch = CHUNK_TOKENS, min(options.n_ubatch, CHUNK_TOKENS)
        params.kv_unified = True  # free cells belong to all sequences, and a shared prefix is held once
        params.n_threads = params.n_threads_batch = options.n_threads
        params.type_k = params.type_v = GGMLQuantizationType[self.kv_type.upper()]
        # Not "auto", which would turn it off where our kernels compute it: they are not the device of the layer.
        params.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_DISABLED if options.exact else lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        )
        params.abort_callback = self._abort
        return params

    @property
    def adapters(self) -> Adapters:
        """LoRA adapters that a call can compute with."""
        assert self._adapters is not None
        return self._adapters

    @property
    def context(self) -> Any:
        """llama.cpp's context, for the samplers."""
        return self._context

    def embed(self, ids: npt.NDArray[np.int64]) -> Float32:
        """Rows of the embedding table: ndarray [shape=(n, hidden), float32], dequantised as llama.cpp does."""
        return self.file.rows("token_embd.weight", ids)

    def release_pages(self) -> None:
        """Drop the weights' pages from this process; the page cache keeps them, and reading brings them back."""
        if self._region is not None:
            begin, end, offset = self._region
            release_region(self._region, offset, offset + end - begin)

    # --- sequences -----------------------------------------------------------------------------------------------

    @property
    def holding(self) -> range:
        """Sequences that hold shared prefixes of chats; no request computes in them."""
        return range(self.n_sequences + 1, len(self._held))

    def keys(self, sequence: int) -> list[Hashable]:
        """Keys that a sequence holds, a copy."""
        return [*self._held[sequence]]

    def held(self, sequence: int) -> int:
        """Positions of a sequence that are in the KV cache."""
        return len(self._held[sequence])

    def common(self, sequence: int, keys: Sequence[Hashable]) -> int:
        """Length of the prefix that a sequence shares with `keys`, without the last key.

        The last one is always computed again, or there would be no logits.
        """
        return common_beginning([*self._held[sequence]], keys[:-1])  # a copy: other threads may ask for a hint

    def rewind(self, sequence: int, n: int = 0) -> None:
        """Cut off a sequence after its first `n` positions."""
        # Even if nothing is cut off: an aborted call leaves positions behind that are not recorded here.
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), sequence, n, -1)
        del self._held[sequence][n:]

    def share(self, source: int, sequence: int, n: int) -> None:
        """Make a sequence start with the first `n` positions of another; they are held once for both."""
        self.rewind(sequence)
        self._lib.llama_memory_seq_cp(self._lib.llama_get_memory(self._context), source, sequence, 0, n)
        self._held[sequence] = self._held[source][:n]

    def read_rows(
        self, sequence: int, first: int, end: int, memory: Callable[[int], Bytes] = lambda n: np.empty(n, np.uint8)
    ) -> KVRows:
        """Copy positions `first` to `end` - 1 of a sequence out of the KV cache.

        Parameters
        ----------
        memory : returns an array of that many bytes.

        Raises
        ------
        UnknownState
            When llama.cpp saves it in an unknown form.
        """
        spare, lib = self.n_sequences, self._lib
        self.rewind(spare)
        lib.llama_memory_seq_cp(lib.llama_get_memory(self._context), sequence, spare, first, end)
        try:
            state = memory(lib.llama_state_seq_get_size(self._context, spare))
            lib.llama_state_seq_get_data(self._context, _pointer(state), len(state), spare)
        finally:
            self.rewind(spare)
        rows = parse(state)
        if len(rows) != end - first:
            raise UnknownState(f"{len(rows)} cells instead of {end - first}")
        return rows

    def append_rows(self, sequence: int, keys: Sequence[Hashable], rows: KVRows) -> None:
        """Append positions computed earlier or elsewhere; the alternative to a call.

        Parameters
        ----------
        keys : keys of the new positions, one for each row.

        Raises
        ------
        CacheFull
            When there are no free cells, or the rows are from another kind of KV cache; the sequences stay unchanged.
        """
        spare, lib, before = self.n_sequences, self._lib, self.held(sequence)
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            part, first = rows[start : start + ROWS_AT_A_TIME], before + start
            state = build(part, first)
            # Into a sequence of its own: llama.cpp empties the one it fills.
            self.rewind(spare)
            with llama.watch_log(lambda line: None):
                n_read = lib.llama_state_seq_set_data(self._context, _pointer(state), len(state), spare)
            if n_read != len(state):
                self.rewind(spare)
                self.rewind(sequence, before)
                raise CacheFull(llama.last_errors())
            lib.llama_memory_seq_cp(lib.llama_get_memory(self._context), spare, sequence, first, first + len(part))
            self.rewind(spare)
        self._held[sequence] += keys

    # --- the call ------------------------------------------------------------------------------------------------

    def compute(
        self, chunks: Sequence[SequenceChunk], cancelled: Callable[[], bool], adapter: str | None
    ) -> list[int]:
        """Append chunks to their sequences in one call of llama.cpp.

        Parameters
        ----------
        chunks : at most `n_batch` positions together; without any, nothing is called.
        cancelled : called often, from inside llama.cpp; returns whether to abandon the call.
        adapter : name of the LoRA adapter to compute with.

        Returns
        -------
        rows : row of the last position of each chunk.

        Raises
        ------
        Cancelled, CacheFull
            Nothing is recorded as held; `rewind` cuts off what the call has written.
        ModelFileError
            When llama.cpp fails.
        """
        if not chunks:
            return []
        assert self._batches is not None
        batch, rows, n = self._batches.filled(chunks, self.embed), [], 0
        for chunk in chunks:
            for i in range(len(chunk.keys)):
                batch.pos[n + i] = self.held(chunk.sequence) + i
                batch.n_seq_id[n + i] = 1
                batch.seq_id[n + i][0] = chunk.sequence
                batch.logits[n + i] = chunk.wants_all_logits
            n += len(chunk.keys)
            batch.logits[n - 1] = chunk.wants_logits or chunk.wants_all_logits
            rows.append(n - 1)
        batch.n_tokens = n
        self._decode(batch, cancelled, adapter)
        for chunk in chunks:
            self._held[chunk.sequence] += chunk.keys
        return rows

    def _decode(self, batch: Any, cancelled: Callable[[], bool], adapter: str | None) -> None:
        self.adapters.use(self._context, adapter)
        self._cancelled = cancelled
        try:
            with llama.watch_log(lambda line: None):
                status = self._lib.llama_decode(self._context, batch)
        finally:
            self._cancelled = lambda: False
        _check_status(status)

    def logits_view(self, row: int) -> Float32:
        """Logits of a row of the last call: ndarray [shape=(vocabulary,), float32].

        The next call may overwrite this memory; do not write to it.
        """
        pointer = self._lib.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, (self.config.vocabulary,))

    def close(self) -> None:
        """Free the model and its context; further calls do nothing."""
        if self._batches:
            self._batches.free()
            self._batches = None
        if self._context:
            self._lib.llama_free(self._context)
        if self._adapters:
            self._adapters.close()
        self._unwatch()
        self._unwatch = lambda: None
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None


def _check_status(status: int) -> None:
    """Raise what `compute` raises for a status of llama_decode."""
    if status == FULL:
        raise CacheFull
    if status == ABORTED:
        raise Cancelled
    if status != 0:
        raise ModelFileError(
            f"llama.cpp failed to decode (status {status}): {llama.last_errors()}; the model file may be damaged: "
            "download it again."
        )


def _pointer(data: npt.NDArray[np.uint8]) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
