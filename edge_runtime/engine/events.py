"""Events of a request, and the queue through which they leave the inference thread."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from edge_runtime.generation.logprobs import TokenScores
from edge_runtime.generation.text_stream import Piece

FinishReason = Literal["stop", "length", "repetition", "cancelled"]


@dataclass(frozen=True)
class Progress:
    """How far the work before the first token is."""

    stage: Literal["decode", "encode", "prefill"]
    """`decode`: frames of videos, which is reported only while nothing else can be done."""
    done: int
    total: int
    share: float = 0.0
    """Of the stage that is done, from 0 to 1; finer than `done`, which counts whole slices."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of them, those that needed no prefill."""


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
    reasoning_tokens: int = 0
    """Of those of the completion."""
    prompt_scores: tuple[TokenScores, ...] = ()
    """Of the prompt's tokens but the first, where they were asked for."""
    end_score: TokenScores | None = None
    """Of the token that ended the answer, if one did and scores were asked for."""
    stop_string: str | None = None
    """The one of the request's that ended the answer, if one did."""


Event = Progress | Piece | Finished


@dataclass(frozen=True)
class Activity:
    """How busy the engine is, and how often it was spared a picture."""

    waiting: int
    running: int
    slots: int
    """Most that can run."""
    picture_lookups: int
    """Groups of slices that requests needed, since the start."""
    picture_hits: int
    """Of them, those whose visual tokens were still there."""
    picture_bytes: int
    """Memory of the visual tokens that are kept."""


class EventQueue:
    """What the inference thread reports, to be waited for in a thread or in an event loop by one reader."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._wake: Callable[[], None] = lambda: None
        self._closing = threading.RLock()  # collecting a forgotten request may cancel it in here
        self.is_closed = False
        """Whether the last event was put in."""

    def put(self, event: Any) -> None:
        """Hand over an event, or an exception."""
        self._queue.put(event)
        self._wake()

    def put_last(self, event: Any) -> None:
        """Hand over the last event, unless there was one; from any thread."""
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
                with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
                    loop.call_soon_threadsafe(arrived.set)

            self._wake = wake  # before looking: what comes after the look sets it
            try:
                return self._queue.get_nowait()
            except queue.Empty:
                await arrived.wait()
