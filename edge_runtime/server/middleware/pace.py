"""How slow somebody may be who sends or reads: so many bytes a second, over any time longer than a patience."""

from __future__ import annotations


class Pace:
    """Time that is left to somebody, who earns it with bytes.

    It begins with `patience_s`; waiting uses it up, and every `min_per_s` bytes bring a second back, up to where it
    began. So a burst and a pause are as good as a steady flow, and nobody can send much first and drip ever after: in
    any `t` seconds at least `(t - patience_s) * min_per_s` bytes have to come.

    Parameters
    ----------
    patience_s : seconds.
    min_per_s : bytes.
    """

    def __init__(self, patience_s: float, min_per_s: float) -> None:
        self._patience_s, self._min_per_s = patience_s, min_per_s
        self.left_s = patience_s
        """Until it is over if nothing comes; not above 0 when it is."""

    def waited(self, seconds: float, n_bytes: int) -> bool:
        """Count a wait and what it brought; returns whether there is time left."""
        left = self.left_s - seconds
        if left > 0:
            left = min(self._patience_s, left + n_bytes / self._min_per_s)
        self.left_s = left
        return left > 0
