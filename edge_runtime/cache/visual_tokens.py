"""Visual tokens computed before, by fingerprint of the pixels they came from; on disk too if requested."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np

from edge_runtime.cache.disk import DiskCache
from edge_runtime.weights.gguf_file import Float32

LIMIT_BYTES = 128 << 20
"""The tokens of 128 slices at full size."""


class SavedTokens:
    """Visual tokens on disk.

    Parameters
    ----------
    root : identifies everything that tokens depend on besides the pixels: the mmproj file and the arithmetic.
    shape : (queries, hidden) of every entry.
    """

    def __init__(self, cache: DiskCache, root: bytes, shape: tuple[int, int]) -> None:
        self._cache, self._root, self._shape = cache, root, shape

    def _name(self, digest: bytes) -> str:
        return hashlib.blake2b(self._root + b"tokens " + digest, digest_size=16).hexdigest()

    def get(self, digest: bytes) -> Float32 | None:
        """Tokens of a group, ndarray [shape=(queries, hidden), float32], if they are stored."""
        name = self._name(digest)
        entry = self._cache.get(name)
        if entry is None:
            return None
        if entry.content.nbytes != 4 * self._shape[0] * self._shape[1]:
            self._cache.forget(name)
            return None
        self._cache.touch([name])
        return entry.content.view("<f4").reshape(self._shape).astype(np.float32)

    def put(self, digest: bytes, tokens: Float32) -> None:
        """Queue tokens for writing."""
        kept = tokens.astype("<f4")
        self._cache.put(self._name(digest), {}, kept.tobytes, kept.nbytes)


class VisualTokenCache:
    """Keeps the most recently used tokens; used only on the inference thread.

    Parameters
    ----------
    limit_bytes : maximum size of the tokens in memory.
    saved : where tokens are also stored.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES, saved: SavedTokens | None = None) -> None:
        self._limit, self._saved = limit_bytes, saved
        self._tokens: OrderedDict[bytes, Float32] = OrderedDict()
        self.n_bytes = 0
        self.lookups = self.hits = 0
        """Since the start."""

    def get(self, digest: bytes) -> Float32 | None:
        """Tokens of a group, ndarray [shape=(queries, hidden), float32], if they are still cached."""
        found = self._tokens.get(digest)
        if found is not None:
            self._tokens.move_to_end(digest)
        elif self._saved is not None and (found := self._saved.get(digest)) is not None:
            self._keep(digest, found)
        self.lookups += 1
        self.hits += found is not None
        return found

    def put(self, digest: bytes, tokens: Float32) -> None:
        """Cache tokens; the least recently used ones make room."""
        self._keep(digest, tokens)
        if self._saved is not None:
            self._saved.put(digest, tokens)

    def clear(self) -> None:
        """Clear the tokens in memory."""
        self._tokens.clear()
        self.n_bytes = 0

    def _keep(self, digest: bytes, tokens: Float32) -> None:
        if digest in self._tokens or tokens.nbytes > self._limit:
            return
        self._tokens[digest] = tokens.copy()  # a view would keep its whole batch in memory
        self.n_bytes += tokens.nbytes
        while self.n_bytes > self._limit:
            self.n_bytes -= self._tokens.popitem(last=False)[1].nbytes
