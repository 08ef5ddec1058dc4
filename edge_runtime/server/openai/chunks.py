"""Events of the engine → streams of chunks: OpenAI's chats and completions, and llama-server's own.

Progress reports follow llama-server: `prompt_progress` if `return_progress` asks for it, and
`timings` if `timings_per_token` does.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Protocol

from edge_runtime.answers import Answer
from edge_runtime.engine.events import Progress
from edge_runtime.generation.text_stream import Piece
from edge_runtime.server import sse
from edge_runtime.server.errors import RequestError
from edge_runtime.server.inference import Answering, ChatCall, Event, Heartbeat, Inference
from edge_runtime.server.openai.replies import running_timings
from edge_runtime.server.openai.reply_types import PromptProgress

Chunk = Mapping[str, Any]


class Chunks(Protocol):
    """Translates the answers of one request."""

    def begin(self) -> Iterable[Chunk]:
        """What comes before the answers."""

    def of_prompt(self) -> Chunk:
        """A chunk without any part of an answer."""

    def piece(self, index: int, piece: Piece) -> Iterable[Chunk]:
        """A piece of an answer."""

    def end(self, index: int, answer: Answer) -> Chunk:
        """The end of an answer."""

    def usage(self, answers: Sequence[Answer]) -> Iterable[Chunk]:
        """What comes after all answers."""


class ProgressReport:
    """What a stream reports about its own work.

    Parameters
    ----------
    answering : says whether prompt progress is reported.
    times : whether each piece carries timings.
    """

    def __init__(self, answering: Answering, *, times: bool) -> None:
        self._answering, self._times = answering, times
        self._started = time.perf_counter()
        self._first: dict[int, float] = {}
        """Number of an answer → time of its first piece."""
        self._reported = -1

    def of_prompt(self, progress: Progress | None) -> dict[str, Any]:
        """Fields that report prompt progress: at its start, then whenever more was read; otherwise none."""
        if not self._answering.reports_progress or progress is None or not progress.prompt_tokens:
            return {}
        done = progress.cached_tokens + (progress.done if progress.stage == "prefill" else 0)
        if done <= self._reported:
            return {}
        self._reported, seconds = done, time.perf_counter() - self._started
        fields: PromptProgress = {
            "total": progress.prompt_tokens,
            "cache": progress.cached_tokens,
            "processed": done,
            "time_ms": round(seconds * 1e3),
        }
        n_read = done - progress.cached_tokens
        times = {"timings": running_timings(progress.cached_tokens, n_read, seconds if n_read else 0.0, 0, 0.0)}
        return {"prompt_progress": fields, **(times if self._times else {})}

    def beat(self, progress: Progress | None) -> str:
        """A comment for whoever reads comments: the stage of the work, if progress is to be reported."""
        return sse.beat(progress if self._answering.reports_progress else None)

    def of_piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Fields for the chunks of a piece."""
        if not self._times:
            return {}
        progress, now = self._answering.progress or Progress("prefill", 0, 0), time.perf_counter()
        first = self._first.setdefault(index, now)
        n_read = progress.prompt_tokens - progress.cached_tokens
        return {
            "timings": running_timings(
                progress.cached_tokens, n_read, first - self._started, piece.n_tokens, now - first
            )
        }


async def lines(
    events: AsyncIterator[tuple[int, Event]], chunks: Chunks, report: ProgressReport, *, last: str = sse.DONE
) -> AsyncIterator[str]:
    """Events of a stream as text.

    Parameters
    ----------
    last : text that ends the stream.
    """
    answers: dict[int, Answer] = {}
    for chunk in chunks.begin():
        yield sse.event(chunk)
    async for number, event in events:
        if isinstance(event, Heartbeat):
            fields = report.of_prompt(event.progress)
            yield sse.event({**chunks.of_prompt(), **fields}) if fields else report.beat(event.progress)
        elif isinstance(event, Answer):
            answers[number] = event
            yield sse.event(chunks.end(number, event))
        else:
            fields = report.of_piece(number, event)
            for chunk in chunks.piece(number, event):
                yield sse.event({**chunk, **fields})
    for chunk in chunks.usage([answers[number] for number in sorted(answers)]):
        yield sse.event(chunk)
    if last:
        yield last


def one_call(calls: Sequence[ChatCall]) -> ChatCall:
    """The only call, whose answers can be streamed.

    Raises
    ------
    RequestError
        When there are several prompts.
    """
    if len(calls) > 1:
        raise RequestError(
            f"prompt holds {len(calls)} prompts, but a stream answers only one; send one, or leave out stream.",
            "prompt",
        )
    return calls[0]


async def whole_answers(inference: Inference, calls: Sequence[ChatCall]) -> list[tuple[Answering, list[Answer]]]:
    """Answers to several prompts, generated concurrently."""
    async with AsyncExitStack() as stack:
        begun = []
        for call in calls:
            begun.append(await inference.begin(call))
            stack.push_async_callback(begun[-1].close)
        return [(answering, await answering.whole()) for answering in begun]
