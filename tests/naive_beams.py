"""Beam search as transformers 4.57 does it, written down plainly: dense arrays, every beginning computed anew.

Independent of `edge_runtime.generation.beam_search` on purpose: the same rules in another form. Where there is no
beam or hypothesis yet, a score of -1e9 stands, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

NOTHING = np.float32(-1e9)


def beam_search(
    logits_after: Callable[[Sequence[int]], np.ndarray],
    n_beams: int,
    *,
    stop_ids: Sequence[int],
    most_tokens: int,
    repetition_penalty: float = 1.0,
    logit_bias: dict[int, float] | None = None,
) -> list[int]:
    """Ids of the answer, stop token included.

    Parameters
    ----------
    logits_after : ids generated so far → logits of the next: ndarray [shape=(vocabulary,)]
    """
    running: list[list[int]] = [[] for _ in range(n_beams)]
    running_scores = np.full(n_beams, NOTHING)
    running_scores[0] = 0
    done: list[list[int]] = [[] for _ in range(n_beams)]
    done_scores, is_done = np.full(n_beams, NOTHING), np.zeros(n_beams, bool)
    n_candidates = max(2, 1 + len(stop_ids)) * n_beams
    for length in range(1, most_tokens + 1):
        table = np.stack([processed(logits_after(ids), ids, repetition_penalty, logit_bias or {}) for ids in running])
        flat = (table + running_scores[:, None]).astype(np.float32).ravel()
        places = np.argsort(-flat, kind="stable")[:n_candidates]
        scores = flat[places]
        ids = [[*running[place // table.shape[1]], int(place % table.shape[1])] for place in places]
        ends = np.array([candidate[-1] in stop_ids or length == most_tokens for candidate in ids])
        # What goes on.
        open_scores = scores + NOTHING * ends
        best = np.argsort(-open_scores, kind="stable")[:n_beams]
        running, running_scores = [ids[i] for i in best], open_scores[best]
        # What has ended, among the first n_beams.
        counts = ends & (np.arange(n_candidates) < n_beams)
        means = scores / np.float32(length) + NOTHING * ~counts
        merged = np.concatenate([done_scores, means])
        best = np.argsort(-merged, kind="stable")[:n_beams]
        done = [[*done, *ids][i] for i in best]
        is_done = np.concatenate([is_done, counts])[best]
        done_scores = merged[best]
        worst = np.where(is_done, done_scores.min(), NOTHING)
        if not (running_scores[0] / np.float32(length) > worst).any():
            break
    return done[0]


def processed(
    logits: np.ndarray, ids: Sequence[int], repetition_penalty: float, logit_bias: dict[int, float]
) -> np.ndarray:
    """Log probabilities after bias and penalty."""
    shifted = logits.astype(np.float64) - logits.max()
    scores = shifted - np.log(np.exp(shifted).sum())
    for token, bias in logit_bias.items():
        scores[token] += bias
    for token in set(ids):
        scores[token] = (
            scores[token] * repetition_penalty if scores[token] < 0 else scores[token] / repetition_penalty
        )
    return scores.astype(np.float32)
