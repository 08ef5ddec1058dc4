"""Embeddings → logits → tokens: the Qwen3 decoder, run by llama.cpp through its low-level API.

Several sequences share one KV cache, and one call computes parts of any of them. A prompt enters as one stream of
embeddings, text and visual tokens alike, cut only by chunk size: cutting it at every picture, as llama.cpp's own
multimodal helpers do, costs a decode call per separator token. Knows nothing of text or pictures: what stands at a
position is a key, and equal keys mean equal embeddings.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from edge_runtime.decoder import llama_cpp as llama
from edge_runtime.decoder.adapters import Adapters
from edge_runtime.decoder.amx_prefill import Prefill
from edge_runtime.decoder.kv_rows import Bytes, KVRows, UnknownState, build, parse
from edge_runtime.decoder.kv_types import choose_kv_type
from edge_runtime.decoder.options import CHUNK_TOKENS, DecoderOptions
from edge_runtime.decoder.prefill_routing import PastSpace, fill, is_ours, own_parts
from edge_runtime.decoder.sequence_chunk import CacheFull, Cancelled, Part
from edge_runtime.errors import ModelFileError, PromptTooLongError
from edge_runtime.system.bus_errors import watch_memory
from edge_runtime.weights.config import decoder_config
from edge_runtime.weights.gguf_file import Float32, GGUFFile
from edge_runtime.weights.memory_map import Region, let_go_of_region, watched

ROWS_AT_A_TIME = 128
"""Positions that are handed to the KV cache together: they are copied for it."""
SCORED_ROWS = 32  # positions of a prompt whose logits are computed in one call, where all are wanted
N_HELD = 2
"""Sequences that hold what chats share (`beginnings`)."""
FULL, ABORTED = 1, 2  # llama_decode: no room in the KV cache; the abort callback answered true


def common_beginning(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Number of positions at which two sequences begin alike."""
    limit = min(len(one), len(other))
    return next((i for i in range(limit) if one[i] != other[i]), limit)


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
        # Behind it those of `beginnings`.
        self._held: list[list[Hashable]] = [[] for _ in range(options.n_sequences + 1 + N_HELD)]
        self._adapters: Adapters | None = None
        self._region: Region | None = None
        self._forget: Callable[[], None] = lambda: None
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
        params.n_seq_max = len(self._held)
        params.n_outputs_max = params.n_seq_max + SCORED_ROWS  # one row of logits per sequence and call, and these
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
        self._own_logits: dict[int, Float32] = {}
        """Of rows of the last call that were not computed by llama.cpp."""
        self._last_row = -1
        self._prefill, self._space = self._choose_prefill(options), PastSpace()
        self._embedding_batch = lib.llama_batch_init(CHUNK_TOKENS, self.config.hidden, 1)
        self._token_batch = lib.llama_batch_init(CHUNK_TOKENS, 0, 1)
        self._batches += [self._embedding_batch, self._token_batch]

    def _choose_prefill(self, options: DecoderOptions) -> Prefill | None:
        """Our way to compute prompts, where it is wanted and llama.cpp takes what comes of it."""
        wanted = False if options.repack else options.own_prefill
        if not is_ours(self.file, self.kv_type, exact=options.exact, wanted=wanted):
            return None
        found = Prefill(self.file, self._region)
        nothing = np.zeros((1, found.form.key_bytes), np.uint8)
        try:
            self.append_rows(0, [0], KVRows(found.form, *[[nothing] * found.form.layers] * 2))
            return found if self.read_rows(0, 0, 1).form == found.form else None
        except (CacheFull, UnknownState):
            return None
        finally:
            self.rewind(0)

    @property
    def fills_itself(self) -> bool:
        """Whether prompts are computed by our kernels."""
        return self._prefill is not None

    def _load_model(self, *, repack: bool) -> Any:
        lib = self._lib
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP
        # Repacked weights cost 3.6 GB and 15 s of loading at full size, and make prefill slower (2 cores measured).
        params.use_extra_bufts = repack
        with llama.watch_log(lambda line: None), watched(self.file.path) as regions:
            model = lib.llama_model_load_from_file(str(self.file.path).encode(), params)
        self._region = regions[0] if regions else None
        if self._region is not None:
            size = self._region.end - self._region.begin
            self._forget = watch_memory(self._region.begin, size, self.file.path)
        if not model:
            raise ModelFileError(
                f"llama.cpp refuses {self.file.path.name}: {llama.last_errors()}; convert or download it again."
            )
        table = self.file.tensors["token_embd.weight"]
        if self._region is not None and "output.weight" in self.file.tensors:
            # llama.cpp reads in the whole file. Of this table, 350 MB of a full-size one, a prompt needs a few rows.
            let_go_of_region(self._region, table.offset, table.offset + table.n_bytes)
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
                f"{self.config.context_length}), one of them for the answer; use fewer or smaller pictures "
                "(--max-slices), less of a video (--packing, --max-frames), a shorter text, or a larger --ctx.",
                *(n_prompt, self.n_ctx),
            )

    @property
    def holding(self) -> range:
        """Sequences that no request computes in: they hold what chats share."""
        return range(self.n_sequences + 1, len(self._held))

    def keys(self, sequence: int) -> list[Hashable]:
        """What a sequence holds, a copy."""
        return [*self._held[sequence]]

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

    def read_rows(
        self, sequence: int, first: int, end: int, memory: Callable[[int], Bytes] = lambda n: np.empty(n, np.uint8)
    ) -> KVRows:
        """Copy what the KV cache holds of positions `first` to `end` - 1 of a sequence.

        Parameters
        ----------
        memory : gives room for a number of bytes.

        Raises
        ------
        UnknownState
            When llama.cpp saves it in a form that is not known.
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
        """Append positions that were computed before, or elsewhere; the other way to fill a sequence than `step`.

        Parameters
        ----------
        keys : what stands at the new positions, one for each row.

        Raises
        ------
        CacheFull
            When there is no room, or the rows are of another kind of KV cache; the sequences are as before.
        """
        spare, lib, before = self.n_sequences, self._lib, self.held(sequence)
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            part, first = rows[start : start + ROWS_AT_A_TIME], before + start
            state = build(part, first)
            # Into a sequence of its own: llama.cpp empties the one that it fills.
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
        rows : for each part the row of its last position, which asks for its logits; of those before it, one less.

        Raises
        ------
        Cancelled
            When `cancelled` answered true before the call was done; the sequences are as before.
        CacheFull
            When there is no room; the sequences are as before.
        """
        own = [] if adapter is not None else own_parts(self, self._prefill, parts)
        before = [self.held(part.sequence) for part in parts]
        self._own_logits.clear()
        rows = [0] * len(parts)
        try:
            rest = [i for i in range(len(parts)) if i not in own]
            for i, row in zip(rest, self._call([parts[i] for i in rest], cancelled, adapter), strict=True):
                rows[i] = row
            if own and self._prefill is not None:
                found = fill(self, self._prefill, self._space, [parts[i] for i in own], cancelled)
                if found is None:
                    raise Cancelled
                for i, logits in zip(own, found, strict=True):
                    rows[i] = -2 - i  # llama.cpp counts from -1 downwards, too
                    if logits is not None:
                        self._own_logits[rows[i]] = logits
        except BaseException:
            for part, n in zip(parts, before, strict=True):
                self.rewind(part.sequence, n)
            raise
        self._last_row = rows[-1]
        return rows

    def _call(self, parts: Sequence[Part], cancelled: Callable[[], bool], adapter: str | None) -> list[int]:
        """Compute parts in one call of llama.cpp; errors as of `step`."""
        if not parts:
            return []
        batch, rows, n = self._filled_batch(parts), [], 0
        for part in parts:
            for i in range(len(part.keys)):
                batch.pos[n + i] = self.held(part.sequence) + i
                batch.n_seq_id[n + i] = 1
                batch.seq_id[n + i][0] = part.sequence
                batch.logits[n + i] = part.wants_all_logits
            n += len(part.keys)
            batch.logits[n - 1] = part.wants_logits or part.wants_all_logits
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

    def logits(self, row: int | None = None) -> Float32:
        """Logits of a row of the last call, by default the last: ndarray [shape=(vocabulary,), float32], a copy."""
        return self.logits_view(self._last_row if row is None else row).copy()

    def is_own(self, row: int) -> bool:
        """Whether a row of the last call was computed by our kernels, so that llama.cpp's samplers cannot see it."""
        return row in self._own_logits

    def logits_view(self, row: int) -> Float32:
        """As `logits`, but memory that the next call may overwrite; not to be written to."""
        if row in self._own_logits:
            return self._own_logits[row]
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
        self._forget()
        self._forget = lambda: None
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None


def _pointer(data: npt.NDArray[np.uint8]) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
