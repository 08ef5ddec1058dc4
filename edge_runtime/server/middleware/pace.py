"""How slowly a client may send or read: a minimum rate, over any time longer than `patience_s`."""

from __future__ import annotations


class Pace:
    """A client's remaining time, which it earns back with bytes.

    It starts at `patience_s`; waiting uses it up, and every `min_per_s` bytes add a second, up to the initial value.
    So bursts with pauses are as good as a steady flow, but nobody can send much at first and then trickle forever: in
    any `t` seconds at least `(t - patience_s) * min_per_s` bytes have to arrive.

    Parameters
    ----------
    patience_s : seconds.
    min_per_s : bytes.
    """

    def __init__(self, patience_s: float, min_per_s: float) -> None:
        self._patience_s, self._min_per_s = patience_s, min_per_s
        self.left_s = patience_s
        """Seconds until the time is up if nothing arrives; 0 or less when it is up."""

    def waited(self, seconds: float, n_bytes: int) -> bool:
        """Count a wait and what it brought; returns whether there is time left."""
        left = self.left_s - seconds
        if left > 0:
            left = min(self._patience_s, left + n_bytes / self._min_per_s)
        self.left_s = left
        return left > 0
