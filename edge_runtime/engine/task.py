"""A request while it is computed, and the states that it goes through.

Data of a single phase lives in an object of its own (`Pictures`, `Decoding`), so what a phase has not created yet
cannot be mistaken for something else.
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
from edge_runtime.engine.drafting import Drafting
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
    """Its prompt is being computed, followed by the answer so far if the task was preempted."""
    DECODING = auto()
    """Its answer is being generated, token by token."""
    PREEMPTED = auto()
    """Its sequences were taken away when the KV cache was full; queued to be recomputed."""
    FINISHED = auto()
    """Done; the scheduler no longer holds it."""


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
    """Visual tokens for the prompt positions that are still to be computed."""

    tokens: dict[bytes, Float32] = field(default_factory=dict)
    """By digest of their group, as far as known."""
    missing: dict[bytes, Group] = field(default_factory=dict)
    """Groups still to be encoded."""
    n_slices: int = 0
    """Slices that had to be encoded when the task was admitted."""

    @property
    def n_encoded(self) -> int:
        """Slices encoded so far."""
        return self.n_slices - sum(len(group) for group in self.missing.values())

    def put(self, found: dict[bytes, Float32]) -> bool:
        """Take newly encoded tokens; returns whether any of them were missing here."""
        new = self.missing.keys() & found.keys()
        self.tokens |= {digest: found[digest] for digest in new}
        self.missing = {digest: group for digest, group in self.missing.items() if digest not in found}
        return bool(new)

    def release(self) -> None:
        """Release the missing groups; they are no longer needed."""
        for group in self.missing.values():
            if isinstance(group, LazyGroup):
                group.release()


@dataclass
class Decoding:
    """What turns logits into an answer; created once the prompt is computed."""

    stream: TextStream
    constraint: Constraint | TextConstraint | None = None
    """What the answer must look like."""
    sampler: Sampler | None = None
    """None in a beam search."""
    beams: BeamRun | None = None
    """The beam search, from its first step on."""
    n_tokens: int = 0
    repetition: RepetitionDetector = field(default_factory=RepetitionDetector)
    must_answer: bool = False
    """Whether the next token must end the reasoning."""
    end_score: TokenScores | None = None
    """Of the token that ended the answer."""
    drafting: Drafting | None = None
    """Guesses of the next tokens, once there was a step for them."""

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
    """Seconds spent on a task, by kind of work."""

    started: float = field(default_factory=time.perf_counter)
    last: float = field(default_factory=time.perf_counter)
    """When the last lap ended."""
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("encode", "prefill", "first_token", "decode"), 0.0)
    )

    def restart(self) -> None:
        """Start a lap; the time since the last one is not counted."""
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
    """A prefix found on disk; used when the task is admitted."""
    events: EventQueue = field(default_factory=EventQueue)
    laps: Laps = field(default_factory=Laps)
    state: TaskState = TaskState.WAITING
    prefix_owner: Task | None = None
    """Another task that is computing a prefix of this one; this one waits for it."""
    sequences: list[int] = field(default_factory=list)
    """Of the KV cache, one per beam; none while the task is queued."""
    pictures: Pictures = field(default_factory=Pictures)
    prompt_scores: list[TokenScores] = field(default_factory=list)
    """For the tokens of the prompt after the first, as far as computed."""
    n_cached: int = 0
    """Positions of the prompt that needed no prefill."""
    decoding: Decoding | None = None
    encoded_slices: int = 0
    """Slices that had to be encoded for it."""
    is_paused: bool = False
    """Whether it gave way to others in the last step."""

    @property
    def gives_way(self) -> bool:
        """Whether it is computed only while no other task is; see `giving_way`."""
        return self.request.gives_way is not None

    @property
    def is_held(self) -> bool:
        """Whether it waits although no other task is here."""
        return self.request.gives_way is not None and self.request.gives_way()

    def enter(self, state: TaskState) -> None:
        """Change to another state; every change of state is made here.

        Raises
        ------
        RuntimeError
            When the task may not change to that state from its current one.
        """
        if state not in _NEXT[self.state]:
            raise RuntimeError(f"A task that is {self.state.name} cannot become {state.name}.")
        self.state = state

    def preempt(self) -> None:
        """Mark it as preempted: its sequences were taken away, and it is recomputed up to where it was."""
        self.enter(TaskState.PREEMPTED)
        if self.decoding is not None and self.decoding.beams is not None:
            self.decoding.n_tokens, self.decoding.beams = 0, None  # nothing was sent yet: the search starts over

    def close(self) -> None:
        """Free what it holds, even if the caller keeps the answer."""
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
        """The beam search, if one is running."""
        return None if self.decoding is None else self.decoding.beams

    @property
    def is_scoring(self) -> bool:
        """Whether the prompt is being computed for its log probabilities."""
        return self.request.scores_prompt and not self.n_tokens

    def may_take(self, other: Task) -> bool:
        """Whether it may reuse what another task computes: without `reuse`, only another answer to its own prompt."""
        return self.request.options.reuse or other.request.prompt is self.request.prompt

    def start_decoding(self, tokenizer: Tokenizer, decoder: Decoder) -> Decoding:
        """Set up what turns logits into text, once the prompt is computed."""
        self.decoding = Decoding.start(self.request, tokenizer, decoder)
        self.laps.end("prefill")
        return self.decoding

    def start_search(self, decoder: Decoder, stop_ids: frozenset[int]) -> BeamRun:
        """Set up a beam search after the prompt."""
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
        """Count one more token."""
        assert self.decoding is not None
        self.decoding.n_tokens += 1
        self.laps.end("decode")
        if self.decoding.n_tokens == 1:
            self.laps.seconds["first_token"] = time.perf_counter() - self.laps.started

    def score(self, decoder: Decoder, row: int, token_id: int) -> TokenScores | None:
        """Log probabilities of a chosen token, if requested."""
        n = self.request.n_alternatives
        return None if n is None else score(decoder.logits_view(row), token_id, n)

    def score_prompt(self, decoder: Decoder, n: int, row: int) -> None:
        """Record log probabilities of the tokens that follow the last `n` positions held of the prompt.

        Parameters
        ----------
        row : row of the last step for the last of these positions.
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
        """Send the pieces of a beam as the answer; returns the finish reason."""
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
        """Send the last event, once; from any thread, so that cancelling need not wait for the engine's thread."""
        decoding, shortened, n_reasoning, stop_string, end_score = self.decoding, False, 0, None, None
        drafts = {} if decoding is None or decoding.drafting is None else decoding.drafting.counts
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
                drafts,
                self.encoded_slices,
            )
        )

    def fail(self, error: Exception) -> None:
        """Send an error as the last event, unless a last event was sent."""
        self.events.put_last(error)

    def report(
        self, stage: Literal["decode", "encode", "prefill"], done: int, total: int, share: float = 0.0
    ) -> None:
        """Report progress before the first token; on the engine's thread, once the task has a sequence."""
        prompt = len(self.request.prompt.ids)
        self.events.put(Progress(stage, done, total, share, prompt, self.n_cached))

    def report_encode(self, partial: float = 0.0) -> None:
        """Report how many slices are encoded, plus the progress on those in work, in slices."""
        done, total = self.pictures.n_encoded, self.pictures.n_slices
        self.report("encode", done, total, (done + partial) / total)

    def report_prefill(self, held: int) -> None:
        """Report how much of the prompt is computed: `held` positions are in the KV cache."""
        done, total = held - self.n_cached, len(self.request.prompt.ids) - self.n_cached
        self.report("prefill", done, total, max(0.0, done / max(1, total)))
