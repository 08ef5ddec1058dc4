"""Which tokens an answer may consist of, and which end it, apart from what the model and its template say.

What enters: the options of one request. What leaves: for every place the token ids among which is chosen. Knows
nothing of text. The words are vLLM's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class TokenRules:
    """Rules of one request, made by `GenerationOptions.token_rules`."""

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
