"""Events of a request, and the queue through which they leave the inference thread."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edge_runtime.generation.logprobs import TokenScores
from edge_runtime.generation.text_stream import Piece

FinishReason = Literal["stop", "length", "repetition", "cancelled"]


@dataclass(frozen=True)
class Progress:
    """Progress of the work before the first token."""

    stage: Literal["decode", "encode", "prefill"]
    """`decode`: frames of videos, reported only while there is nothing else to do."""
    done: int
    total: int
    share: float = 0.0
    """Share of the stage that is done, from 0 to 1; finer than `done`, which counts whole slices."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of these, the ones that needed no prefill."""


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
    """Whether a structured answer was closed early because tokens ran out."""
    reasoning_tokens: int = 0
    """Part of `completion_tokens`."""
    prompt_scores: tuple[TokenScores, ...] = ()
    """For all tokens of the prompt but the first, if requested."""
    end_score: TokenScores | None = None
    """Of the token that ended the answer, if one did and scores were requested."""
    stop_string: str | None = None
    """The request's stop string that ended the answer, if one did."""
    drafts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By source of drafts: tokens that were checked, and those of them that were right."""
    encoded_slices: int = 0
    """Slices that were encoded for it; the visual tokens of all others were known."""


Event = Progress | Piece | Finished


@dataclass(frozen=True)
class Activity:
    """How busy the engine is, and how often a picture need not be encoded."""

    waiting: int
    running: int
    slots: int
    """Maximum of `running`."""
    picture_lookups: int
    """Groups of slices that requests needed, since the start."""
    picture_hits: int
    """Of these, groups whose visual tokens were still cached."""
    picture_bytes: int
    """Memory of the visual tokens and features of slices that are kept."""


class EventQueue:
    """Events from the inference thread, for one reader, who waits in a thread or in an event loop."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._wake: Callable[[], None] = lambda: None
        self._closing = threading.RLock()  # collecting a dropped request may cancel it in here
        self.is_closed = False
        """Whether the last event was put."""

    def put(self, event: Any) -> None:
        """Add an event, or an exception."""
        self._queue.put(event)
        self._wake()

    def put_last(self, event: Any) -> None:
        """Add the last event, unless there was one; from any thread."""
        with self._closing:
            if self.is_closed:
                return
            self.is_closed = True
        self.put(event)

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
                with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody is waiting
                    loop.call_soon_threadsafe(arrived.set)

            self._wake = wake  # before checking the queue: an event that arrives after the check sets it
            try:
                return self._queue.get_nowait()
            except queue.Empty:
                await arrived.wait()
