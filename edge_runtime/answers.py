"""An answer, while it is generated and when it is finished, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from edge_runtime.engine.events import Event, Finished, FinishReason, Progress
from edge_runtime.errors import MessageError, RequestCancelled
from edge_runtime.generation.grounding import Region, find_regions
from edge_runtime.generation.logprobs import TokenLogprobs
from edge_runtime.generation.text_stream import Piece
from edge_runtime.pipeline import Prepared
from edge_runtime.structured_output.tools import MalformedCall, ToolCall

TOY_NOTICE = (
    "This model is a toy to try the program out with: beyond short words in capital letters, simple shapes and their "
    "number, its answers mean nothing; use MiniCPM-V 4.5 for real questions."
)
"""Attached to every answer of a model whose file says that it is a toy."""


@dataclass(frozen=True)
class Answer:
    """A finished answer; `str()` of it is the text."""

    answer: str
    reasoning: str | None
    """None if the model did not think."""
    finish_reason: FinishReason
    model: str
    prompt_tokens: int
    visual_tokens: int
    cached_tokens: int
    """Tokens of the prompt that the KV cache still held from earlier requests, or that were read from disk."""
    completion_tokens: int
    slices: list[list[int]]
    """[width, height] of everything that was encoded."""
    dropped_turns: int = 0
    """Oldest turns of the conversation that were left out; always 0 without `context_shift`."""
    fitted_slices: int | None = None
    """Maximum cells per picture after `fit` has lowered it; None if it was not lowered."""
    shortened: bool = False
    """Whether a structured answer was closed early because tokens ran out: well-formed, but perhaps incomplete."""
    stop_string: str | None = None
    """The one of `stop` that ended the answer, of which it is not part; None if something else ended it."""
    tool_calls: list[ToolCall] = field(default_factory=list)
    malformed_calls: list[MalformedCall] = field(default_factory=list)
    """Attempted tool calls that are not valid ones; they are part of the text, too."""
    pictures: list[list[int]] = field(default_factory=list)
    """[width, height] of the conversation's pictures and video frames, upright, in order."""
    videos: list[dict[str, Any]] = field(default_factory=list)
    """For each video: size, fps, frames_in_video, seconds, packing, and for every group of frames times_s (in the
    video) and temporal_ids (from the start of the part that was used)."""
    timings_s: dict[str, float] = field(default_factory=dict)
    """load, image, encode, prefill, first_token (since the call), decode, total"""
    logprobs: list[TokenLogprobs] | None = None
    """For every token but the one that ended the answer; None if not requested."""
    reasoning_tokens: int = 0
    """Part of `completion_tokens`: all up to the token that ended the reasoning."""
    end_logprobs: TokenLogprobs | None = None
    """For the token that ended the answer, if one did and `logprobs` were requested."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """For every token of the prompt, if requested; the first, which nothing precedes, has NaN."""
    drafts: dict[str, dict[str, int]] = field(default_factory=dict)
    """By source of guesses (option `drafts`): how many tokens were `checked`, and how many of them `accepted`."""
    prefix: str = ""
    """Start of the answer in the conversation's last message; `answer` is only what comes after it."""
    reasoning_prefix: str = ""
    """The same for the reasoning."""
    notice: str | None = None
    """What users must know about the model before they trust its answer: `TOY_NOTICE`, or None."""
    encoded_slices: int = 0
    """Number of `slices` that were encoded for it; the visual tokens of the others were known."""

    def __str__(self) -> str:
        return self.answer

    @property
    def text(self) -> str:
        """The same as `answer`, under the name that it has in a `Piece`."""
        return self.answer

    def regions(self, picture: int = -1) -> list[Region]:
        """Places that the answer, prefix included, names (`<box>`, `<quad>`, `<point>`), in pixels of a picture.

        Parameters
        ----------
        picture : its index in the conversation, from 0. The answer does not say which one it is about; the default is
            the last, which the question usually follows.

        Raises
        ------
        MessageError
            When there is no such picture.
        """
        if not -len(self.pictures) <= picture < len(self.pictures):
            raise MessageError(
                f"Places were asked for in picture {picture}, but the conversation has {len(self.pictures)} "
                "pictures; they are counted from 0."
            )
        width, height = self.pictures[picture]
        return find_regions(self.prefix + self.answer, (width, height))

    def boxes(self, picture: int = -1) -> list[Region]:
        """The `regions` that are boxes."""
        return [region for region in self.regions(picture) if region.kind == "box"]

    def message(self) -> dict[str, Any]:
        """The answer as a message of the conversation, to be followed by the results of its calls (role `tool`).

        If the answer continued the conversation's last message, this is the whole turn and replaces that message.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.prefix + self.answer}
        if reasoning := self.reasoning_prefix + (self.reasoning or ""):
            message["reasoning_content"] = reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.as_message() for call in self.tool_calls]
        return message


class Running(Protocol):
    """An answer's events, from the engine of this process (`engine.Running`) or from another server."""

    def next_event(self) -> Event:
        """Wait for the next event; `Finished` is the last. An error ends the answer, too."""

    async def next_event_async(self) -> Event:
        """As `next_event`, but wait in an event loop."""

    def cancel(self) -> None:
        """End the work; the last event (`cancelled`) comes at once."""


class AnswerStream:
    """An answer being generated: iterate over its `Piece`s, then ask for `result()`.

    Dropping the stream stops the work behind it. KeyboardInterrupt while waiting leaves it intact: you can cancel it
    or read on.
    """

    def __init__(
        self, running: Running, finish: Callable[[str, str | None, list[TokenLogprobs], Finished], Answer]
    ) -> None:
        self._running, self._finish = running, finish
        self._logprobs: list[TokenLogprobs] = []
        self._text: dict[str, list[str]] = {"answer": [], "reasoning": [], "tool_call": []}
        self._calls: list[ToolCall] = []
        self._malformed: list[MalformedCall] = []
        self._result: Answer | Exception | None = None
        self.on_progress: Callable[[Progress], None] = lambda progress: None
        """Called with the progress of encoding and prefill."""

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        while self._result is None:
            try:
                event = self._running.next_event()
            except Exception as error:  # not KeyboardInterrupt: that one is for the user who waits
                self._result = error
                raise
            if (piece := self._take(event)) is not None:
                return piece
        raise StopIteration

    async def next_piece(self) -> Piece | None:
        """Wait for the next piece in an event loop; None at the end."""
        while self._result is None:
            try:
                event = await self._running.next_event_async()
            except Exception as error:
                self._result = error
                raise
            if (piece := self._take(event)) is not None:
                return piece
        return None

    def _take(self, event: Event) -> Piece | None:
        if isinstance(event, Piece):
            self._text[event.kind].append(event.text)
            self._logprobs += event.logprobs
            self._calls += [event.call] if event.call else []
            self._malformed += [event.malformed] if event.malformed else []
            return event
        if isinstance(event, Progress):
            self.on_progress(event)
        else:
            reasoning = "".join(self._text["reasoning"])
            answer = self._finish("".join(self._text["answer"]), reasoning or None, self._logprobs, event)
            self._result = replace(answer, tool_calls=self._calls, malformed_calls=self._malformed)
        return None

    def cancel(self) -> None:
        """Stop generating; the stream then ends with the reason `cancelled`."""
        self._running.cancel()

    def result(self) -> Answer:
        """Wait for the end and return the whole answer."""
        for _ in self:
            pass
        return self.finished()

    def finished(self) -> Answer:
        """The answer of a stream that was read to its end."""
        if not isinstance(self._result, Answer):
            assert self._result is not None
            raise self._result
        return self._result


def make_answer(
    prepared: Prepared,
    end: Finished,
    answer: str,
    reasoning: str | None,
    *,
    model: str,
    timings: Mapping[str, float],
    logprobs: list[TokenLogprobs] | None,
    prompt_logprobs: list[TokenLogprobs] | None = None,
    end_logprobs: TokenLogprobs | None = None,
    notice: str | None = None,
) -> Answer:
    """Build an answer from the request and how it ended."""
    return Answer(
        answer=answer,
        reasoning=reasoning,
        finish_reason=end.reason,
        model=model,
        prompt_tokens=len(prepared.prompt.ids),
        visual_tokens=sum(last - first for first, last in prepared.prompt.bounds),
        cached_tokens=end.cached_tokens,
        completion_tokens=end.completion_tokens,
        slices=prepared.slices,
        dropped_turns=prepared.dropped_turns,
        fitted_slices=prepared.fitted_slices,
        shortened=end.shortened,
        stop_string=end.stop_string,
        pictures=prepared.pictures,
        videos=prepared.videos,
        timings_s={name: round(seconds, 6) for name, seconds in timings.items()},
        logprobs=logprobs,
        reasoning_tokens=end.reasoning_tokens,
        drafts={name: {"checked": n, "accepted": right} for name, (n, right) in end.drafts.items()},
        prompt_logprobs=prompt_logprobs,
        end_logprobs=end_logprobs,
        prefix=prepared.begun.content if prepared.begun else "",
        reasoning_prefix=prepared.begun.reasoning if prepared.begun else "",
        notice=notice,
        encoded_slices=end.encoded_slices,
    )


def results(streams: Sequence[AnswerStream]) -> list[Answer]:
    """Whole answers of several streams; if one fails or waiting is interrupted, the others are cancelled."""
    try:
        return [stream.result() for stream in streams]
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise


class AsyncAnswer:
    """An answer in an event loop: `await` it, or iterate over its `Piece`s with `async for` first.

    Nothing happens before that; pictures are decoded in a thread. Cancelling the waiting task ends the work.

    Parameters
    ----------
    start : prepares and submits the request; takes whether its pieces are wanted as they come, and the options.
    options : of the request. A cancelled answer stops in `on_image`, `on_look` or `on_check` while pictures and
        videos are read and a schema is compiled.
    """

    def __init__(self, start: Callable[[bool, dict[str, Any]], AnswerStream], options: Mapping[str, Any]) -> None:
        self._start, self._options = start, dict(options)
        self._stream: AnswerStream | None = None
        self._cancelled = threading.Event()
        for name in ("on_image", "on_look", "on_check"):
            self._options[name] = self._unless_cancelled(self._options.get(name))

    def _unless_cancelled(self, call: Callable[..., None] | None) -> Callable[..., None]:
        def called(*arguments: Any) -> None:
            if self._cancelled.is_set():
                raise RequestCancelled("The request was cancelled while its texts, pictures and videos were read.")
            if call is not None:
                call(*arguments)

        return called

    async def _started(self, *, streaming: bool) -> AnswerStream:
        if self._stream is None:
            self._stream = await asyncio.to_thread(self._start, streaming, self._options)
            if self._cancelled.is_set():
                self._stream.cancel()
        return self._stream

    def __aiter__(self) -> AsyncAnswer:
        return self

    async def __anext__(self) -> Piece:
        piece = await self._next_piece(streaming=True)
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def _next_piece(self, *, streaming: bool) -> Piece | None:
        try:
            return await (await self._started(streaming=streaming)).next_piece()
        except asyncio.CancelledError:
            self.cancel()
            raise

    def __await__(self) -> Generator[Any, None, Answer]:
        return self._whole().__await__()

    async def _whole(self) -> Answer:
        while await self._next_piece(streaming=False):
            pass
        return (await self._started(streaming=False)).finished()

    def cancel(self) -> None:
        """Stop generating; the answer then ends with the reason `cancelled`.

        While pictures and videos are read, there is no answer yet: waiting for one then raises `RequestCancelled`.
        """
        self._cancelled.set()
        if self._stream is not None:
            self._stream.cancel()
