"""Tower features of slices that were encoded lately, so that equal slices are encoded once.

Frames of a screen recording or of a still camera repeat; so do the blank cells of scans. A group's visual tokens
depend on the times of its frames, so they differ (`cache.visual_tokens` keeps those that do not), but the tower sees
pixels alone. What is kept is what would be computed again, to the bit: a slice's features depend on no other slice.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np

from edge_runtime.inputs.slicing import Slice
from edge_runtime.weights.gguf_file import Float32

LIMIT_BYTES = 64 << 20
"""Features to keep: those of 13 slices of ordinary size."""


def slice_digest(item: Slice) -> bytes:
    """Fingerprint of all that decides a slice's features: its pixels and their shape."""
    digest = hashlib.blake2b(repr(item.pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(item.pixels).data)
    return digest.digest()


class KnownFeatures:
    """Features by digest, the least recently used ones dropped first."""

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self._kept: OrderedDict[bytes, Float32] = OrderedDict()
        self._n_bytes = 0

    @property
    def n_bytes(self) -> int:
        """Memory of the features."""
        return self._n_bytes

    def get(self, digest: bytes) -> Float32 | None:
        """Features of a slice, ndarray [shape=(P, width), float32], not to be written to; None if unknown."""
        found = self._kept.get(digest)
        if found is not None:
            self._kept.move_to_end(digest)
        return found

    def put(self, digest: bytes, features: Float32) -> None:
        """Keep features; does nothing if they are known or larger than everything that may be kept."""
        if digest in self._kept or features.nbytes > self._limit:
            return
        kept = features.copy() if features.base is not None else features  # not the whole run it is a part of
        self._kept[digest] = kept
        self._n_bytes += kept.nbytes
        while self._n_bytes > self._limit:
            self._n_bytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self._n_bytes = 0
