"""What is asked of the engine, what comes back, and what is known of a request in between."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from edge_runtime.constraint import AnswerForm, Constraint
from edge_runtime.encoder import Group
from edge_runtime.prompt import Prompt
from edge_runtime.sampling import Sampler, SamplingOptions
from edge_runtime.streaming import Piece, RepetitionDetector, TextStream
from edge_runtime.weights import Float32

FinishReason = Literal["stop", "length", "repetition", "cancelled"]


@dataclass(frozen=True)
class Progress:
    """How far the work before the first token is."""

    stage: Literal["encode", "prefill"]
    done: int
    total: int


@dataclass(frozen=True)
class Finished:
    """The last event of a request."""

    reason: FinishReason
    completion_tokens: int
    cached_tokens: int
    """Tokens of the prompt that needed no prefill."""
    timings_s: dict[str, float]
    """encode, prefill, first_token (since submission), decode"""
    shortened: bool = False
    """Whether a structured answer was brought to its end because tokens ran out."""


Event = Progress | Piece | Finished


@dataclass(frozen=True)
class Request:
    """A prepared request."""

    prompt: Prompt
    groups: list[Group]
    """Slices behind `prompt.bounds`, one group for each."""
    digests: list[bytes]
    """Of the groups; see `pipeline.group_digest`."""
    sampling: SamplingOptions
    thinking: bool
    max_tokens: int
    stop: Sequence[str] = ()
    thinking_budget: int | None = None
    """Tokens of reasoning after which it is ended."""
    repetition_check: bool = True
    """End an answer that goes in circles."""
    form: AnswerForm | None = None
    """What the answer must look like."""
    tools: Sequence[str] = ()
    """Names of the functions that the model may call."""

    def keys(self) -> list[Hashable]:
        """What stands at each position of the prompt: a token, or a place in a group's visual tokens."""
        keys: list[Hashable] = list(self.prompt.ids)
        for digest, (first, end) in zip(self.digests, self.prompt.bounds, strict=True):
            keys[first:end] = [(digest, i) for i in range(end - first)]
        return keys


class EventQueue:
    """What the inference thread tells, to be waited for in a thread or in an event loop by one reader."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._wake: Callable[[], None] = lambda: None

    def put(self, event: Any) -> None:
        """Hand over an event, or an exception."""
        self._queue.put(event)
        self._wake()

    def get(self) -> Any:
        """Wait in short steps, so that Ctrl-C is noticed on every system."""
        while True:
            try:
                return self._queue.get(timeout=0.5)
            except queue.Empty:
                continue

    async def get_async(self) -> Any:
        """Wait in an event loop."""
        loop = asyncio.get_running_loop()
        while True:
            arrived = asyncio.Event()

            def wake(arrived: asyncio.Event = arrived) -> None:
                with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
                    loop.call_soon_threadsafe(arrived.set)

            self._wake = wake  # before looking: what comes after the look sets it
            try:
                return self._queue.get_nowait()
            except queue.Empty:
                await arrived.wait()


@dataclass(eq=False)
class Task:
    """A request on its way through the scheduler."""

    request: Request
    is_cancelled: Callable[[], bool]
    events: EventQueue = field(default_factory=lambda: EventQueue())
    started: float = field(default_factory=time.perf_counter)
    keys: list[Hashable] = field(default_factory=list)
    """Prompt and answer so far."""
    sequence: int = -1
    leader: Task | None = None
    """Another task that is computing a beginning of this one; it is waited for."""
    sampler: Sampler | None = None
    stream: TextStream | None = None
    constraint: Constraint | None = None
    must_answer: bool = False
    """Whether reasoning is to end with the next token."""
    circles: RepetitionDetector = field(default_factory=RepetitionDetector)
    tokens: dict[bytes, Float32] = field(default_factory=dict)
    """Visual tokens, as far as they are needed and known."""
    missing: dict[bytes, Group] = field(default_factory=dict)
    n_slices: int = 0
    """To be encoded in all."""
    n_cached: int = 0
    n_tokens: int = 0
    timings: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("encode", "prefill", "first_token", "decode"), 0.0)
    )
    lap: float = field(default_factory=time.perf_counter)

    def take_lap(self, name: str) -> None:
        """Add the seconds since the last lap to a timing."""
        now = time.perf_counter()
        self.timings[name] += now - self.lap
        self.lap = now

    def finish(self, reason: FinishReason) -> None:
        """Send the last event."""
        shortened = self.constraint is not None and self.constraint.shortened
        self.events.put(Finished(reason, self.n_tokens, self.n_cached, self.timings, shortened))
