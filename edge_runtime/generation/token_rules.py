"""Which tokens an answer may contain, and which end it, beyond what the model and its template define.

Input: the options of one request. Output: the token ids that may come next. Knows nothing of text. The names are
vLLM's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class TokenRules:
    """Rules of one request, built by `GenerationOptions.token_rules`."""

    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the answer, besides the model's own; they are not part of it."""
    min_tokens: int = 0
    """Number of tokens before which nothing ends the answer."""
    ignore_eos: bool = False
    """Whether the model's own end tokens are never chosen."""
    allowed: tuple[int, ...] | None = None
    """The only tokens that may be chosen."""

    def candidates(self, n_tokens: int, n_rows: int, ends: frozenset[int]) -> npt.NDArray[np.int64] | None:
        """Token ids that may be chosen next: ndarray [shape=(n,), int64]; None: all.

        Parameters
        ----------
        n_tokens : tokens in the answer so far.
        n_rows : number of logits.
        ends : the model's end tokens.
        """
        shut = ends if self.ignore_eos else frozenset()
        if n_tokens < self.min_tokens:
            shut = ends | self.stop_ids
        if self.allowed is None and not shut:
            return None
        ids = np.arange(n_rows) if self.allowed is None else np.array(self.allowed, np.int64)
        return ids[~np.isin(ids, [*shut])] if shut else ids
