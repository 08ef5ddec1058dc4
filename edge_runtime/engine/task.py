"""What is known of a request while it is computed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

from edge_runtime.cache.prefixes import Saved
from edge_runtime.decoder.decoder import Decoder
from edge_runtime.decoder.sequence_chunk import Part
from edge_runtime.engine.events import EventQueue, Finished, FinishReason, Progress
from edge_runtime.engine.request import Request
from edge_runtime.generation.beam_search import Beam, BeamRun, BeamSearch
from edge_runtime.generation.logprobs import TokenScores, score
from edge_runtime.generation.sampling import Sampler
from edge_runtime.generation.text_stream import RepetitionDetector, TextStream
from edge_runtime.inputs.slice_groups import Group
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.structured_output.constraint import Constraint
from edge_runtime.structured_output.text_form import TextConstraint
from edge_runtime.weights.gguf_file import Float32


@dataclass(frozen=True)
class Expected:
    """A beginning that will probably be asked for."""

    request: Request
    """That reads ahead."""
    saved: Saved = field(default_factory=Saved)


@dataclass(eq=False)
class Task:
    """A request on its way through the scheduler."""

    request: Request
    is_cancelled: Callable[[], bool]
    events: EventQueue = field(default_factory=lambda: EventQueue())
    started: float = field(default_factory=time.perf_counter)
    keys: list[Hashable] = field(default_factory=list)
    """Prompt and answer so far."""
    saved: Saved = field(default_factory=Saved)
    """A beginning that was found on disk."""
    sequence: int = -1
    more_sequences: list[int] = field(default_factory=list)
    """Of the further beams."""
    beam_run: BeamRun | None = None
    leader: Task | None = None
    """Another task that is computing a beginning of this one; it is waited for."""
    sampler: Sampler | None = None
    stream: TextStream | None = None
    constraint: Constraint | TextConstraint | None = None
    must_answer: bool = False
    """Whether reasoning is to end with the next token."""
    circles: RepetitionDetector = field(default_factory=RepetitionDetector)
    tokens: dict[bytes, Float32] = field(default_factory=dict)
    """Visual tokens, as far as they are needed and known."""
    missing: dict[bytes, Group] = field(default_factory=dict)
    n_slices: int = 0
    """To be encoded in all."""
    prompt_scores: list[TokenScores] = field(default_factory=list)
    """Of the prompt's tokens behind the first, as far as they are computed."""
    end_score: TokenScores | None = None
    """Of the token that ended the answer."""
    n_cached: int = 0
    n_tokens: int = 0
    timings: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("encode", "prefill", "first_token", "decode"), 0.0)
    )
    lap: float = field(default_factory=time.perf_counter)
    is_finished: bool = False
    """Whether the last event was sent."""
    _finishing: Any = field(default_factory=threading.RLock)  # collecting a forgotten request may cancel it in here

    @property
    def is_scoring(self) -> bool:
        """Whether the prompt is being computed for its log probabilities."""
        return self.request.scores_prompt and not self.n_tokens

    @property
    def sequences(self) -> list[int]:
        """All that the task occupies."""
        return [self.sequence, *self.more_sequences]

    def may_take(self, other: Task) -> bool:
        """Whether it may begin with what another task computes: without reuse, another answer to its own prompt."""
        return self.request.options.reuse or other.request.prompt is self.request.prompt

    def start_answer(self, tokenizer: Tokenizer, decoder: Decoder) -> None:
        """Set up what turns logits into text, once the prompt is computed."""
        request = self.request
        self.stream = TextStream(
            tokenizer,
            thinking=request.options.thinking,
            stop=request.options.stop,
            stop_in_reasoning=request.options.stop_in_reasoning,
            tools=request.tools,
            goes_on=request.begun is not None and request.begun.is_reasoning,
        )
        if request.form is not None:
            self.constraint = request.form.start(thinking=request.options.thinking)
        if request.options.n_beams == 1:
            self.sampler = Sampler(request.sampling, decoder.config.vocabulary, decoder.n_ctx)
        self.take_lap("prefill")

    def start_search(self, decoder: Decoder, stop_ids: frozenset[int]) -> BeamRun:
        """Set up a beam search behind the prompt."""
        request = self.request
        search = BeamSearch(
            request.options.n_beams,
            stop_ids=stop_ids,
            most_tokens=min(request.options.max_tokens, decoder.n_ctx - len(self.keys)),
            repetition_penalty=request.sampling.repetition_penalty,
            logit_bias=request.sampling.logit_bias,
            n_alternatives=request.n_alternatives,
        )
        return BeamRun(search, decoder, self.sequences)

    def count_token(self) -> None:
        """Note that there is one token more."""
        self.n_tokens += 1
        self.take_lap("decode")
        if self.n_tokens == 1:
            self.timings["first_token"] = time.perf_counter() - self.started

    def score(self, decoder: Decoder, row: int, token_id: int) -> TokenScores | None:
        """Log probabilities of a chosen token, where they were asked for."""
        n = self.request.n_alternatives
        return None if n is None else score(decoder.logits_view(row), token_id, n)

    def score_prompt(self, decoder: Decoder, n: int, row: int) -> None:
        """Take log probabilities of the tokens that follow the last `n` positions that are held of the prompt.

        Parameters
        ----------
        row : of the last call, for the last of them.
        """
        ids, n_alternatives, first = (
            self.request.prompt.ids,
            self.request.n_alternatives or 0,
            len(self.prompt_scores),
        )
        for i in range(n):
            if first + i + 1 < len(ids):
                logits = decoder.logits_view(row - n + 1 + i)
                self.prompt_scores.append(score(logits, ids[first + i + 1], n_alternatives))

    def put_answer(self, found: Beam, stop_ids: frozenset[int]) -> FinishReason:
        """Send the pieces of a whole answer; returns why it ends."""
        assert self.stream is not None
        self.n_tokens = len(found.ids)
        reason: FinishReason = "length"
        for token_id, scores in zip_longest(found.ids, found.scores):
            if token_id in stop_ids:
                reason = "stop"
                break
            for piece in self.stream.feed(token_id, scores):
                self.events.put(piece)
        for piece in self.stream.finish():
            self.events.put(piece)
        return "stop" if self.stream.stopped else reason

    def take_lap(self, name: str) -> None:
        """Add the seconds since the last lap to a timing."""
        now = time.perf_counter()
        self.timings[name] += now - self.lap
        self.lap = now

    def finish(self, reason: FinishReason) -> None:
        """Send the last event, once; from any thread, for whoever cancels need not wait for this thread."""
        with self._finishing:
            if self.is_finished:
                return
            self.is_finished = True
        shortened = self.constraint is not None and self.constraint.shortened
        n_reasoning = self.stream.n_reasoning if self.stream is not None else 0
        met = self.stream.stop_string if self.stream is not None and reason == "stop" else None
        self.events.put(
            Finished(
                reason,
                self.n_tokens,
                self.n_cached,
                dict(self.timings),
                shortened,
                n_reasoning,
                tuple(self.prompt_scores),
                self.end_score,
                met,
            )
        )

    def tell(self, stage: Literal["decode", "encode", "prefill"], done: int, total: int, share: float = 0.0) -> None:
        """Tell how far the work before the first token is; from the engine's thread, once a sequence was found."""
        prompt = len(self.request.prompt.ids)
        self.events.put(Progress(stage, done, total, share, prompt, self.n_cached))

    def tell_encode(self, partial: float = 0.0) -> None:
        """Tell how many slices are encoded, and how much of those that are being encoded, in slices."""
        done = self.n_slices - sum(len(group) for group in self.missing.values())
        self.tell("encode", done, self.n_slices, (done + partial) / self.n_slices)

    def tell_prefill(self, held: int) -> None:
        """Tell how much of the prompt is computed: `held` positions stand in the KV cache."""
        done, total = held - self.n_cached, len(self.request.prompt.ids) - self.n_cached
        self.tell("prefill", done, total, max(0.0, done / max(1, total)))

    def fail(self, error: Exception) -> None:
        """Send an error as the last event, unless there was one."""
        with self._finishing:
            if self.is_finished:
                return
            self.is_finished = True
        self.events.put(error)


def is_worth_leaving(tasks: Sequence[Task], parts: Sequence[Part], started: float, row_s: float) -> bool:
    """Whether to give up a call of llama.cpp for the sake of those who were cancelled.

    Leaving loses what the call has done for the others, staying computes the rest for nobody. So it is left while the
    share of the time that has passed is smaller than the share of the rows that nobody wants any more: then the
    others are done sooner, too. Where it is not left, its rest is shorter than the others' part.

    Parameters
    ----------
    parts : of the call, one for each task.
    started : when it began, by `time.perf_counter`.
    row_s : seconds that a row takes.
    """
    sizes = [(len(part.keys), task.is_cancelled()) for task, part in zip(tasks, parts, strict=True)]
    unwanted, n_rows = sum(n for n, is_cancelled in sizes if is_cancelled), sum(n for n, _ in sizes)
    if unwanted in (0, n_rows):
        return unwanted > 0
    return time.perf_counter() - started < unwanted * row_s
