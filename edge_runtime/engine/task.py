"""What is known of a request while it is computed, and the states that it goes through.

What belongs to one phase only lies in a part of its own (`Pictures`, `Decoding`), so that what a phase has not made
is not there to be mistaken for something else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import zip_longest
from typing import Literal

from edge_runtime.cache.prefixes import Saved
from edge_runtime.decoder.decoder import Decoder
from edge_runtime.engine.events import EventQueue, Finished, FinishReason, Progress
from edge_runtime.engine.request import Request
from edge_runtime.generation.beam_search import Beam, BeamRun, BeamSearch
from edge_runtime.generation.logprobs import TokenScores, score
from edge_runtime.generation.sampling import Sampler
from edge_runtime.generation.text_stream import RepetitionDetector, TextStream
from edge_runtime.inputs.slice_groups import Group, LazyGroup
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.structured_output.constraint import Constraint
from edge_runtime.structured_output.text_form import TextConstraint
from edge_runtime.weights.gguf_file import Float32


class TaskState(Enum):
    """Where a task is on its way through the scheduler."""

    WAITING = auto()
    """Queued, without a sequence."""
    ENCODING = auto()
    """Some of its pictures have no visual tokens yet."""
    PREFILL = auto()
    """Its prompt is computed; behind it the answer so far, if the task was preempted."""
    DECODING = auto()
    """Its answer is generated, token by token."""
    PREEMPTED = auto()
    """Its sequences were taken away when the KV cache was full; queued to be computed again."""
    FINISHED = auto()
    """The scheduler has let go of it."""


_NEXT = {
    TaskState.WAITING: {TaskState.ENCODING, TaskState.PREFILL, TaskState.FINISHED},
    TaskState.ENCODING: {TaskState.PREFILL, TaskState.PREEMPTED, TaskState.FINISHED},
    TaskState.PREFILL: {TaskState.DECODING, TaskState.PREEMPTED, TaskState.FINISHED},
    TaskState.DECODING: {TaskState.PREEMPTED, TaskState.FINISHED},
    TaskState.PREEMPTED: {TaskState.ENCODING, TaskState.PREFILL, TaskState.FINISHED},
    TaskState.FINISHED: set[TaskState](),
}


@dataclass
class Pictures:
    """Visual tokens that the positions of a prompt need which are to be computed."""

    tokens: dict[bytes, Float32] = field(default_factory=dict)
    """By the digest of their group, as far as they are known."""
    missing: dict[bytes, Group] = field(default_factory=dict)
    """Groups that are to be encoded."""
    n_slices: int = 0
    """That were to be encoded when the task was admitted."""

    @property
    def n_encoded(self) -> int:
        """Slices of them that are encoded."""
        return self.n_slices - sum(len(group) for group in self.missing.values())

    def put(self, found: dict[bytes, Float32]) -> bool:
        """Take what was encoded; whether some of it was missing."""
        new = self.missing.keys() & found.keys()
        self.tokens |= {digest: found[digest] for digest in new}
        self.missing = {digest: group for digest, group in self.missing.items() if digest not in found}
        return bool(new)

    def release(self) -> None:
        """What is missing is needed no more."""
        for group in self.missing.values():
            if isinstance(group, LazyGroup):
                group.release()


@dataclass
class Decoding:
    """What turns logits into an answer; there is none before the prompt is computed."""

    stream: TextStream
    constraint: Constraint | TextConstraint | None = None
    """What the answer must look like."""
    sampler: Sampler | None = None
    """None in a beam search."""
    beams: BeamRun | None = None
    """A beam search, from its first step on."""
    n_tokens: int = 0
    repetition: RepetitionDetector = field(default_factory=RepetitionDetector)
    must_answer: bool = False
    """Whether reasoning is to end with the next token."""
    end_score: TokenScores | None = None
    """Of the token that ended the answer."""

    @classmethod
    def start(cls, request: Request, tokenizer: Tokenizer, decoder: Decoder) -> Decoding:
        """Set up what a request asks for."""
        stream = TextStream(
            tokenizer,
            thinking=request.options.thinking,
            stop=request.options.stop,
            stop_in_reasoning=request.options.stop_in_reasoning,
            tools=request.tools,
            goes_on=request.begun is not None and request.begun.is_reasoning,
        )
        constraint = None if request.form is None else request.form.start(thinking=request.options.thinking)
        sampler = (
            Sampler(request.sampling, decoder.config.vocabulary, decoder.n_ctx)
            if request.options.n_beams == 1
            else None
        )
        return cls(stream, constraint, sampler)


@dataclass
class Laps:
    """Seconds of a task, by what they went into."""

    started: float = field(default_factory=time.perf_counter)
    last: float = field(default_factory=time.perf_counter)
    """When the last lap ended."""
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("encode", "prefill", "first_token", "decode"), 0.0)
    )

    def restart(self) -> None:
        """Begin a lap; what has passed since the last one belongs to none."""
        self.last = time.perf_counter()

    def end(self, name: str) -> None:
        """Add the seconds since the last lap ended."""
        now = time.perf_counter()
        self.seconds[name] += now - self.last
        self.last = now


@dataclass(eq=False)
class Task:
    """A request on its way through the scheduler."""

    request: Request
    is_cancelled: Callable[[], bool]
    keys: list[Hashable] = field(default_factory=list)
    """Prompt and answer so far."""
    saved: Saved = field(default_factory=Saved)
    """A prefix that was found on disk; taken when the task is admitted."""
    events: EventQueue = field(default_factory=EventQueue)
    laps: Laps = field(default_factory=Laps)
    state: TaskState = TaskState.WAITING
    prefix_owner: Task | None = None
    """Another task, which is computing a prefix of this one; it is waited for."""
    sequences: list[int] = field(default_factory=list)
    """Of the KV cache, one for each beam; none while the task is queued."""
    pictures: Pictures = field(default_factory=Pictures)
    prompt_scores: list[TokenScores] = field(default_factory=list)
    """Of the prompt's tokens behind the first, as far as they are computed."""
    n_cached: int = 0
    """Positions of the prompt that needed no prefill."""
    decoding: Decoding | None = None

    def enter(self, state: TaskState) -> None:
        """Go to another state; every change of state is made here.

        Raises
        ------
        RuntimeError
            When no task may go there from where this one is.
        """
        if state not in _NEXT[self.state]:
            raise RuntimeError(f"A task that is {self.state.name} cannot become {state.name}.")
        self.state = state

    def preempt(self) -> None:
        """Its sequences were taken away: it is to be computed again, up to where it was."""
        self.enter(TaskState.PREEMPTED)
        if self.decoding is not None and self.decoding.beams is not None:
            self.decoding.n_tokens, self.decoding.beams = 0, None  # nothing of it was sent: the search begins anew

    def close(self) -> None:
        """Free what it holds; whoever keeps the answer need not keep that."""
        self.enter(TaskState.FINISHED)
        if self.decoding is not None:
            self.decoding.beams = None
            if self.decoding.sampler is not None:
                self.decoding.sampler.close()
        self.pictures.release()
        self.pictures = Pictures()

    @property
    def sequence(self) -> int:
        """The sequence that holds the prompt."""
        return self.sequences[0]

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer so far."""
        return 0 if self.decoding is None else self.decoding.n_tokens

    @property
    def beams(self) -> BeamRun | None:
        """The beam search, if there is one at work."""
        return None if self.decoding is None else self.decoding.beams

    @property
    def is_scoring(self) -> bool:
        """Whether the prompt is being computed for its log probabilities."""
        return self.request.scores_prompt and not self.n_tokens

    def may_take(self, other: Task) -> bool:
        """Whether it may begin with what another task computes: without reuse, another answer to its own prompt."""
        return self.request.options.reuse or other.request.prompt is self.request.prompt

    def start_decoding(self, tokenizer: Tokenizer, decoder: Decoder) -> Decoding:
        """Set up what turns logits into text, once the prompt is computed."""
        self.decoding = Decoding.start(self.request, tokenizer, decoder)
        self.laps.end("prefill")
        return self.decoding

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
        """Record that there is one token more."""
        assert self.decoding is not None
        self.decoding.n_tokens += 1
        self.laps.end("decode")
        if self.decoding.n_tokens == 1:
            self.laps.seconds["first_token"] = time.perf_counter() - self.laps.started

    def score(self, decoder: Decoder, row: int, token_id: int) -> TokenScores | None:
        """Log probabilities of a chosen token, where they were asked for."""
        n = self.request.n_alternatives
        return None if n is None else score(decoder.logits_view(row), token_id, n)

    def score_prompt(self, decoder: Decoder, n: int, row: int) -> None:
        """Take log probabilities of the tokens that follow the last `n` positions that are held of the prompt.

        Parameters
        ----------
        row : of the last step, for the last of them.
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

    def put_beam(self, found: Beam, stop_ids: frozenset[int]) -> FinishReason:
        """Send the pieces of a beam as the answer; returns why it ends."""
        assert self.decoding is not None
        stream = self.decoding.stream
        self.decoding.n_tokens = len(found.ids)
        reason: FinishReason = "length"
        for token_id, scores in zip_longest(found.ids, found.scores):
            if token_id in stop_ids:
                reason = "stop"
                break
            for piece in stream.feed(token_id, scores):
                self.events.put(piece)
        for piece in stream.finish():
            self.events.put(piece)
        return "stop" if stream.stopped else reason

    def finish(self, reason: FinishReason) -> None:
        """Send the last event, once; from any thread, for whoever cancels need not wait for the engine's."""
        decoding, shortened, n_reasoning, stop_string, end_score = self.decoding, False, 0, None, None
        if decoding is not None:
            shortened = decoding.constraint is not None and decoding.constraint.shortened
            n_reasoning, end_score = decoding.stream.n_reasoning, decoding.end_score
            stop_string = decoding.stream.stop_string if reason == "stop" else None
        self.events.put_last(
            Finished(
                reason,
                self.n_tokens,
                self.n_cached,
                dict(self.laps.seconds),
                shortened,
                n_reasoning,
                tuple(self.prompt_scores),
                end_score,
                stop_string,
            )
        )

    def fail(self, error: Exception) -> None:
        """Send an error as the last event, unless there was one."""
        self.events.put_last(error)

    def report(
        self, stage: Literal["decode", "encode", "prefill"], done: int, total: int, share: float = 0.0
    ) -> None:
        """Report progress before the first token; from the engine's thread, once a sequence was found."""
        prompt = len(self.request.prompt.ids)
        self.events.put(Progress(stage, done, total, share, prompt, self.n_cached))

    def report_encode(self, partial: float = 0.0) -> None:
        """Report how many slices are encoded, and how much of those that are being encoded, in slices."""
        done, total = self.pictures.n_encoded, self.pictures.n_slices
        self.report("encode", done, total, (done + partial) / total)

    def report_prefill(self, held: int) -> None:
        """Report how much of the prompt is computed: `held` positions stand in the KV cache."""
        done, total = held - self.n_cached, len(self.request.prompt.ids) - self.n_cached
        self.report("prefill", done, total, max(0.0, done / max(1, total)))
