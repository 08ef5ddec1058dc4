"""Visual tokens that were computed before, by the fingerprint of the pixels they came from."""

from __future__ import annotations

from collections import OrderedDict

from edge_runtime.weights import Float32

LIMIT_BYTES = 128 << 20
"""At full size the tokens of 128 slices."""


class VisualTokenCache:
    """Keeps what was used last; the inference thread's alone.

    Parameters
    ----------
    limit_bytes : most bytes of tokens to keep.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self._tokens: OrderedDict[bytes, Float32] = OrderedDict()
        self._n_bytes = 0

    def get(self, digest: bytes) -> Float32 | None:
        """Tokens of a group, ndarray [shape=(queries, hidden), float32], if they are still here."""
        found = self._tokens.get(digest)
        if found is not None:
            self._tokens.move_to_end(digest)
        return found

    def put(self, digest: bytes, tokens: Float32) -> None:
        """Keep tokens; those unused for longest make room."""
        if digest in self._tokens or tokens.nbytes > self._limit:
            return
        self._tokens[digest] = tokens.copy()  # a part of an array would keep its whole batch alive
        self._n_bytes += tokens.nbytes
        while self._n_bytes > self._limit:
            self._n_bytes -= self._tokens.popitem(last=False)[1].nbytes
