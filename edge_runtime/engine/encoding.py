"""Visual tokens for the pictures of tasks, from the cache of visual tokens or from the encoder.

Knows nothing of sequences, and of prompts only the positions to be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edge_runtime.cache.caches import Caches
from edge_runtime.cache.visual_tokens import VisualTokenCache
from edge_runtime.decoder.sequence_chunk import Cancelled
from edge_runtime.engine.request import Request
from edge_runtime.engine.task import Pictures, Task
from edge_runtime.inputs.slice_groups import LoadedGroup
from edge_runtime.system.memory import give_back
from edge_runtime.vision.encoder import ImageEncoder
from edge_runtime.weights.gguf_file import Float32


class PictureEncoding:
    """Encoder and cache of visual tokens. Used only on the inference thread."""

    def __init__(self, encoder: ImageEncoder, caches: Caches) -> None:
        self._encoder, self._low_memory = encoder, caches.low_memory
        self.visual_tokens = VisualTokenCache(saved=caches.tokens)
        self._has_idle_memory = False

    def batch_patches(self, *, is_brief: bool) -> int:
        """Patches to encode together.

        Parameters
        ----------
        is_brief : others wait for the end of the step: one group, or in low memory, where a layer that was packed is
            used for a whole picture, what `encode` can interrupt.
        """
        return 0 if is_brief and not self._low_memory else self._encoder.batch_patches

    def record(self, request: Request) -> None:
        """Record that a request has pictures, which will leave memory behind."""
        self._has_idle_memory |= bool(request.groups)

    def look_up(self, request: Request, n: int) -> Pictures:
        """Visual tokens that a prompt needs after its first `n` positions: the cached ones, and what is missing."""
        behind = [i for i, (_, end) in enumerate(request.prompt.bounds) if end > n]
        known = {request.digests[i]: self.visual_tokens.get(request.digests[i]) for i in behind}
        tokens = {digest: found for digest, found in known.items() if found is not None}
        missing = {request.digests[i]: request.groups[i] for i in behind if known[request.digests[i]] is None}
        return Pictures(tokens, missing, sum(len(group) for group in missing.values()))

    @property
    def kept_bytes(self) -> int:
        """Memory of visual tokens and of features of slices that are kept in case they are needed again."""
        return self.visual_tokens.n_bytes + self._encoder.known_bytes

    def encode(
        self,
        batch: dict[bytes, LoadedGroup],
        tasks: Sequence[Task],
        must_leave: Callable[[], bool] = lambda: False,
        *,
        is_brief: bool = False,
    ) -> dict[bytes, Float32]:
        """Encode a batch of groups; returns visual tokens by digest and caches them.

        Parameters
        ----------
        tasks : tasks that wait for some of them; they get progress reports between layers of the tower.
        must_leave : whether others need the processor; asked between layers, too.
        is_brief : in low memory, leave after as many layers as a slice takes; the next call goes on from there.

        Raises
        ------
        Cancelled
            When all of these tasks were cancelled, or others need the processor.
        """
        ends_at: int | None = None

        def on_layer(done: int, total: int) -> None:
            nonlocal ends_at
            if ends_at is None:
                ends_at = done + self._encoder.tower.config.layers if is_brief and self._low_memory else total
            if must_leave() or all(task.is_cancelled() for task in tasks) or ends_at <= done < total:
                raise Cancelled
            for task in tasks:
                n_slices = sum(len(batch[digest]) for digest in batch.keys() & task.pictures.missing.keys())
                task.report_encode(done / total * n_slices)

        found = dict(zip(batch, self._encoder.encode([*batch.values()], on_layer), strict=True))
        for digest, tokens in found.items():
            self.visual_tokens.put(digest, tokens)
        return found

    def release_memory(self) -> None:
        """No task waits for pictures: free memory that would add to what their prompts take."""
        if self._low_memory:
            self._encoder.unload()
        give_back()

    def release_idle_memory(self) -> None:
        """While idle: free the memory that pictures have left behind, on all threads."""
        if self._has_idle_memory:
            self._has_idle_memory = False
            if self._low_memory:  # still loaded if the last request was cancelled or failed
                self._encoder.unload()
            self._encoder.release_idle_memory()
            give_back()
