"""Beam search: logits for several partial answers → the answer with the highest mean log probability.

Source: transformers 4.57, `GenerationMixin._beam_search` with its defaults (length penalty 1, early stopping off), as
the official `chat(sampling=False)` calls it. In short: take the log-softmax of the logits, apply the processors *to
log probabilities* (so a repetition penalty always multiplies), and sum over the answer. Consider the best `1 + stop
tokens` times `n_beams` continuations; those that end and rank among the first `n_beams` become hypotheses, scored by
the sum over the length, stop token included. The search ends when the best running beam, as it is, does not score
above the worst of `n_beams` hypotheses.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from edge_runtime.decoder.decoder import Decoder
from edge_runtime.decoder.sequence_chunk import SequenceChunk
from edge_runtime.generation.logprobs import TokenScores, log_softmax, score, top_ids
from edge_runtime.weights.gguf_file import Float32


class Beam(NamedTuple):
    """A partial answer."""

    ids: tuple[int, ...] = ()
    total: np.float32 = np.float32(0)
    """Sum of the processed log probabilities; float32 as in the source, so that near ties fall the same way."""
    scores: tuple[TokenScores, ...] = ()
    """Of each token, if requested."""

    @property
    def mean(self) -> np.float32:
        """Score that hypotheses are compared by."""
        return self.total / np.float32(len(self.ids))


class BeamSearch:
    """The search itself: arrays in, decisions out; knows nothing of a KV cache.

    Parameters
    ----------
    repetition_penalty : over generated tokens only, because the official code generates from embeddings.
    logit_bias : what is added to a token's log probability, before the penalty, by token id.
    most_tokens : beams of this length are hypotheses, whether they end or not.
    n_alternatives : alternatives stored with each token's log probability; None stores no log probabilities.
    """

    def __init__(
        self,
        n_beams: int,
        *,
        stop_ids: Collection[int],
        most_tokens: int,
        repetition_penalty: float = 1.0,
        logit_bias: Sequence[tuple[int, float]] = (),
        n_alternatives: int | None = None,
    ) -> None:
        self._n_beams, self._stop_ids, self._most_tokens = n_beams, stop_ids, most_tokens
        self._penalty, self._n_alternatives = np.float32(repetition_penalty), n_alternatives
        self._bias_ids = [token_id for token_id, _ in logit_bias]
        self._bias = np.array([bias for _, bias in logit_bias], np.float32)
        self.beams = [Beam()]
        """Running partial answers, best first; a single empty one before the first step."""
        self._finished: list[Beam] = []
        self.is_done = False

    def advance(self, logits: Sequence[Float32]) -> list[int]:
        """Append a token to every beam.

        Parameters
        ----------
        logits : for each of `beams`: ndarray [shape=(vocabulary,), float32]

        Returns
        -------
        parents : for each of the new `beams`, index of the previous beam that it extends.
        """
        length = len(self.beams[0].ids) + 1
        is_last = length >= self._most_tokens
        parents: list[int] = []
        running: list[Beam] = []
        for rank, (total, parent, token_id) in enumerate(self._best_continuations(logits)):
            if token_id not in self._stop_ids and not is_last:
                if len(running) < self._n_beams:
                    running.append(self._extended(parent, token_id, total, logits[parent]))
                    parents.append(parent)
            elif rank < self._n_beams:
                self._finished.append(self._extended(parent, token_id, total, logits[parent]))
        self.beams = running
        self._keep_best()
        full = len(self._finished) == self._n_beams
        self.is_done = not running or (full and bool(running[0].mean <= self._finished[-1].mean))
        return parents

    def _best_continuations(self, logits: Sequence[Float32]) -> list[tuple[np.float32, int, int]]:
        """Possible continuations as (total, beam, token id), best first; at least `n_beams` of them do not end."""
        n = (1 + len(self._stop_ids)) * self._n_beams
        found = []
        for number, (beam, row) in enumerate(zip(self.beams, logits, strict=True)):
            totals = log_softmax(row)
            if self._bias_ids:
                totals[self._bias_ids] += self._bias
            seen = list(set(beam.ids))
            totals[seen] *= np.where(totals[seen] < 0, self._penalty, 1 / self._penalty)
            totals += beam.total
            found += [(totals[i], number, i) for i in top_ids(totals, n).tolist()]
        found.sort(key=lambda entry: -entry[0])
        return found[:n]

    def _extended(self, parent: int, token_id: int, total: np.float32, row: Float32) -> Beam:
        beam = self.beams[parent]
        scores = beam.scores
        if self._n_alternatives is not None:
            scores = (*scores, score(row, token_id, self._n_alternatives))
        return Beam((*beam.ids, token_id), total, scores)

    def _keep_best(self) -> None:
        self._finished.sort(key=lambda beam: -beam.mean)
        del self._finished[self._n_beams :]

    def stop(self) -> None:
        """End the search; running beams count as they are."""
        self._finished += [beam for beam in self.beams if beam.ids]
        self._keep_best()
        self.is_done = True

    @property
    def best(self) -> Beam:
        """The answer of a finished search."""
        return self._finished[0]


class BeamRun:
    """A search in the KV cache: every beam is a sequence, and common prefixes are held once.

    Parameters
    ----------
    sequences : one per beam; the first holds the prompt.
    """

    def __init__(self, search: BeamSearch, decoder: Decoder, sequences: Sequence[int]) -> None:
        self.search, self._decoder, self._sequences = search, decoder, list(sequences)

    def chunks(self) -> list[SequenceChunk]:
        """Chunks for the next step: the last token of every beam."""
        beams = self.search.beams
        return [SequenceChunk(self._sequences[i], beam.ids[-1:]) for i, beam in enumerate(beams)]

    def advance(self, rows: Sequence[int]) -> None:
        """Choose the next tokens from the rows that the last step returned for `chunks`."""
        parents = self.search.advance([self._decoder.logits_view(row) for row in rows])
        if not self.search.is_done:
            self._place(parents)

    def _place(self, parents: Sequence[int]) -> None:
        """Give every beam a sequence that holds its parent: the parent's own, or one that no beam extends."""
        free = [sequence for i, sequence in enumerate(self._sequences) if i not in parents]
        placed: list[int] = []
        for parent in parents:
            sequence = source = self._sequences[parent]
            if source in placed:
                sequence = free.pop()
                self._decoder.share(source, sequence, self._decoder.held(source))
            placed.append(sequence)
        self._sequences = [*placed, *free]
