"""A `ChatCall` → events: the one way from any protocol to the engine and back.

Nothing here knows a protocol's format. A call is admitted (or refused: the queue is full), its model is pinned, its
pictures are decoded off the event loop, then it is submitted; then come the engine's own pieces, heartbeats while
there are none, and the whole `Answer` of each. A client that stops listening cancels the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from edge_runtime.answers import Answer, AnswerStream
from edge_runtime.engine.events import Progress
from edge_runtime.errors import MessageError
from edge_runtime.generation.sampling import MAX_NEW_TOKENS
from edge_runtime.generation.text_stream import Piece
from edge_runtime.inputs.video.frame_choice import VideoLimits
from edge_runtime.inputs.workers.pool import ClientsDecoders, DecoderPool
from edge_runtime.prompt.build import Prompt
from edge_runtime.server.context_tokens import messages_of
from edge_runtime.server.errors import RequestError, ShuttingDown, TimedOut, TooLarge
from edge_runtime.server.fetch import Fetcher
from edge_runtime.server.look import Look
from edge_runtime.server.media import brought_in, has_long_text, has_media, text_bytes
from edge_runtime.server.middleware.shares import Places, asking, in_background
from edge_runtime.server.registry.catalog import Listed
from edge_runtime.server.registry.facts import refuse_what_it_cannot
from edge_runtime.server.registry.loaded import ModelRegistry, Use
from edge_runtime.server.settings import Settings

R = TypeVar("R")
TEXT_THREADS = 4
"""Threads that prepare short texts. Pictures, long texts and forms of answers have one each, and wait there for a
decoder, or for their turn to be tokenised."""
BACKGROUND_THREADS = 8
"""More of them, for requests that take nobody's place."""
FORMS = ("schema", "choices", "regex", "grammar", "tools")
"""Options that are compiled before the answer starts."""
MAX_DECODERS = 4
"""Files that are decoded at the same time; more would only hold more pictures in memory."""


@dataclass(frozen=True)
class ChatCall:
    """A client's request in the runtime's terms."""

    model: str | None
    """As the client names it; None takes the default."""
    messages: str | Sequence[Any]
    """As `edge_runtime.inputs.messages` takes them."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of `Model.submit`, `n` left out."""
    n: int = 1
    keep_alive_s: float | None = None
    context: Sequence[int] | None = None
    """Ids of the conversation before `messages`, as Ollama's clients keep it; see `context_tokens`."""
    reports_progress: bool = False
    """Whether every step before the first token is an event, instead of a heartbeat now and then."""


@dataclass(frozen=True)
class Heartbeat:
    """Nothing new to show."""

    progress: Progress | None
    """Progress of the work before the first token, if known."""


Event = Piece | Heartbeat | Answer
"""An `Answer` is the last event of each answer."""


@dataclass
class Outcome:
    """How a call ended, for metrics."""

    model: str
    started: float
    """time.perf_counter()"""
    answers: list[Answer] = field(default_factory=list)
    error: BaseException | None = None
    seconds: float = 0.0
    in_background: bool = False
    """Whether nobody waited for it."""


class Answering:
    """The answers to one call while they are generated. Always close it."""

    def __init__(
        self,
        streams: list[AnswerStream],
        use: Use,
        release: contextlib.AsyncExitStack,
        deadline: float,
        beat_s: float,
        messages: str | Sequence[Any] = (),
        reports_progress: bool = False,
    ) -> None:
        self.use, self.messages = use, messages
        self.reports_progress = reports_progress
        self._streams, self._release, self._deadline, self._beat_s = streams, release, deadline, beat_s
        self.progress: Progress | None = None
        """Progress of the work before the first token, as last reported."""
        self._queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        self._pumps = [asyncio.create_task(self._pump(i, stream)) for i, stream in enumerate(streams)]
        self.outcome: Outcome = Outcome(use.listed.name, time.perf_counter())

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Events with the number of the answer they belong to.

        Raises
        ------
        EdgeRuntimeError
            When an answer fails; all of them end then. `TimedOut` when the request takes too long.
        """
        left, ended = len(self._streams), dict[int, Answer]()
        while left:
            try:
                event = await self._next()
            except Exception as error:
                self.outcome.error = error
                raise
            if event is None:
                yield 0, Heartbeat(self.progress)
                continue
            if isinstance(event[1], Answer):
                left -= 1
                ended[event[0]] = event[1]
                self.outcome.answers = [
                    ended[number] for number in sorted(ended)
                ]  # the first has the prompt's counts
            yield event

    async def _next(self) -> tuple[int, Event] | None:
        """The next event, or None after a while without one."""
        if not self._queue.empty():
            found = self._queue.get_nowait()
        else:
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                raise TimedOut("The answer took longer than this server allows; ask for less, or try again later.")
            try:
                found = await asyncio.wait_for(self._queue.get(), min(self._beat_s, left_s))
            except TimeoutError:
                return None
        number, event = found
        if isinstance(event, Exception):
            raise event
        return number, event

    async def whole(self) -> list[Answer]:
        """Wait for all answers; otherwise as `events`."""
        found = {number: event async for number, event in self.events() if isinstance(event, Answer)}
        return [found[number] for number in sorted(found)]

    async def _pump(self, number: int, stream: AnswerStream) -> None:
        """Move the pieces of one answer into the common queue."""

        def on_progress(progress: Progress) -> None:
            self.progress = progress
            if self.reports_progress and number == 0:
                self._queue.put_nowait((number, Heartbeat(progress)))

        stream.on_progress = on_progress
        try:
            while (piece := await stream.next_piece()) is not None:
                self._queue.put_nowait((number, piece))
            answer = stream.finished()
            if answer.finish_reason == "cancelled":
                raise ShuttingDown("The answer was stopped; try again later.")
            self._queue.put_nowait((number, answer))
        except Exception as error:  # noqa: BLE001 - handed to the reader, who raises it
            self._queue.put_nowait((number, error))

    async def close(self) -> None:
        """Cancel what still runs, and release the model."""
        for stream in self._streams:
            stream.cancel()
        for pump in self._pumps:
            pump.cancel()
        self._streams, self._pumps = [], []
        await self._release.aclose()


def with_texts(listed: Listed, messages: str | Sequence[Any]) -> str | Sequence[Any]:
    """A conversation after the model's own texts: its system prompt, unless there is one, and its turns."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or not (listed.system or listed.messages):
        return messages
    roles = [message.get("role") for message in messages if isinstance(message, Mapping)]
    has_system = any(role in ("system", "developer") for role in roles[:1])
    system = [{"role": "system", "content": listed.system}] if listed.system and not has_system else []
    own = [*messages[:1]] if has_system else system
    return [*own, *listed.messages, *messages[1 if has_system else 0 :]]


def _cut_into(most_tokens: int, max_slices: int | None, n_queries: int) -> dict[str, int]:
    """The cell limit with which a picture takes at most so many visual tokens, its overview included.

    Raises
    ------
    RequestError
        When one slice alone takes more.
    """
    if most_tokens < n_queries:
        raise RequestError(
            f"image_max_tokens is {most_tokens}, but a picture takes at least {n_queries} tokens; allow that many.",
            "image_max_tokens",
        )
    cells = max(1, most_tokens // n_queries - 1)
    return {"max_slices": min(cells, max_slices or cells)}


class Inference:
    """Admits, prepares and submits calls.

    Parameters
    ----------
    on_end : functions called with the outcome of every call that was started.
    """

    def __init__(self, settings: Settings, registry: ModelRegistry) -> None:
        self.settings, self.registry = settings, registry
        self._places = Places(settings.max_queue, settings.queue_of_one, "requests are waiting or running")
        self.on_end: list[Callable[[Outcome], None]] = []
        self._texts = ThreadPoolExecutor(TEXT_THREADS, "edge-runtime texts")
        self._long = ThreadPoolExecutor(settings.max_queue + BACKGROUND_THREADS, "edge-runtime pictures")
        n_decoders = min(MAX_DECODERS, os.cpu_count() or 1)
        self.decoders = DecoderPool(n_decoders, settings.decode_timeout_s, settings.max_pixels)
        self._running: set[Answering] = set()
        self._stopping = threading.Event()
        self._fetcher = Fetcher(settings)
        self._limits = {
            "pixel_limit": settings.max_pixels,
            "page_limit": settings.max_pages,
            "file_limit_bytes": settings.max_video_bytes,
            "video_limits": VideoLimits(most_bytes=settings.max_video_bytes, most_pixels=settings.max_pixels),
        }

    @property
    def n_open(self) -> int:
        """Calls that are waiting or running."""
        return self._places.n

    async def begin(self, call: ChatCall) -> Answering:
        """Admit a call, prepare and submit it.

        Raises
        ------
        EngineBusy
            When too many calls are open, or too many of this client's.
        EdgeRuntimeError
            When something about the call, or its model, is wrong; nothing was computed.
        """
        started, deadline = time.perf_counter(), time.monotonic() + self.settings.request_timeout_s
        if in_background() is not None:
            deadline = math.inf  # it may have to wait for others all day
        async with contextlib.AsyncExitStack() as stack:
            self._admit(stack)
            use = await stack.enter_async_context(self.registry.use(call.model, call.keep_alive_s))
            messages = await self._conversation(call, use)
            streams = await self._submit(call, use, messages)
            beat_s = self.settings.heartbeat_s
            answering = Answering(streams, use, stack.pop_all(), deadline, beat_s, messages, call.reports_progress)
            answering.outcome.started, answering.outcome.in_background = started, in_background() is not None
            self._watch(answering)
            return answering

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Count work that needs no model but a processor among the open calls.

        Raises
        ------
        EngineBusy
            As `begin`.
        """
        leave = self._places.take(asking())
        try:
            yield
        finally:
            leave()

    def check_answers(self, n: int) -> None:
        """Check the number of answers before memory is allocated for them.

        Raises
        ------
        RequestError
            When there are none, or too many.
        """
        if not 1 <= n <= self.settings.max_answers:
            shown = n if abs(n) < 10**18 else "a number of more than 18 digits"
            raise RequestError(f"n is {shown}; expected a number from 1 to {self.settings.max_answers}.", "n")

    def _admit(self, stack: contextlib.AsyncExitStack) -> None:
        if in_background() is None:  # otherwise it takes nobody's place
            stack.callback(self._places.take(asking()))

    def is_asked(self) -> bool:
        """Whether somebody waits for an answer; from any thread."""
        return self._places.n > 0

    def _watch(self, answering: Answering) -> None:
        """Track the call until it is closed."""
        self._running.add(answering)

        def ended() -> None:
            self._running.discard(answering)
            answering.outcome.seconds = time.perf_counter() - answering.outcome.started
            for notify in self.on_end:
                notify(answering.outcome)

        answering._release.callback(ended)

    async def _conversation(self, call: ChatCall, use: Use) -> str | Sequence[Any]:
        """The messages of a call, after the model's texts and the conversation so far."""
        if call.options.get("raw"):
            return call.messages
        if call.context is None:
            return with_texts(use.listed, call.messages)
        before = await asyncio.to_thread(messages_of, call.context, use.model.tokenizer)
        new: list[Any] = [{"role": "user", "content": call.messages}] if isinstance(call.messages, str) else []
        new = new or [message for message in call.messages if message not in before or message["role"] != "system"]
        return with_texts(replace(use.listed, messages=()), [*before, *new])  # its turns are in the context

    async def _submit(self, call: ChatCall, use: Use, messages: str | Sequence[Any]) -> list[AnswerStream]:
        """Decode pictures and submit, off the event loop."""
        self.check_answers(call.n)
        decoders = ClientsDecoders(self.decoders, asking())
        options = {**self._limits, "decoders": decoders, **use.listed.defaults, **call.options}
        if use.listed.adapters:
            options.setdefault("adapter", next(iter(use.listed.adapters)))
        if "image_max_tokens" in options:
            options |= _cut_into(options.pop("image_max_tokens"), options.get("max_slices"), use.model.n_queries)
        if type(options.setdefault("max_tokens", MAX_NEW_TOKENS)) is int:
            options["max_tokens"] = min(options["max_tokens"], self.settings.max_tokens)
        messages = await brought_in(messages, self.settings, self._fetcher)
        if in_background() is not None:
            options["gives_way"] = self.is_asked

        def submit(gone: threading.Event) -> list[AnswerStream]:
            refuse_what_it_cannot(use.listed, self.settings, options)
            try:
                streams = use.model.submit(messages, n=call.n, **options, **Look(gone, self._stopping).everywhere())
            except TypeError as error:  # an option that Model.submit does not know
                raise MessageError(f"An option is unknown: {error}.") from error
            if gone.is_set():  # if set later, nobody holds the streams, which cancels them, too
                for stream in streams:
                    stream.cancel()
            return streams

        return await self._while_wanted(messages, options, submit)

    async def _while_wanted(
        self, messages: Any, options: Mapping[str, Any], work: Callable[[threading.Event], R]
    ) -> R:
        """Run work on a conversation in a thread; it is notified when nobody waits for it any more.

        Short texts have their own threads, so they never wait for a picture, a long text or a schema.
        """
        gone = threading.Event()
        takes_long = has_media(messages) or any(options.get(name) for name in FORMS) or has_long_text(messages)
        threads = self._long if takes_long else self._texts
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, work, gone)
        finally:
            gone.set()

    async def read(self, work: Callable[[Callable[[], None]], R]) -> R:
        """Run what makes calls of a long request, in a thread; admitted as `begin` does.

        Parameters
        ----------
        work : its argument has to be called often; it raises when nobody waits any more.
        """
        gone = threading.Event()
        with self.admitted():
            try:
                look = Look(gone, self._stopping)
                return await asyncio.get_running_loop().run_in_executor(self._long, work, look)
            finally:
                gone.set()

    async def count_tokens(self, call: ChatCall) -> int:
        """Tokens of the prompt that a call would have; otherwise as `build_prompt`."""
        return len((await self.build_prompt(call)).ids)

    async def build_prompt(self, call: ChatCall) -> Prompt:
        """The prompt that a call would have, without computing anything; admitted as `begin` does.

        Raises
        ------
        TooLarge
            When there is more text than is worth counting: it may be longer than any context, but not unlimited.
        EdgeRuntimeError
            As `begin`.
        """
        async with contextlib.AsyncExitStack() as stack:
            self._admit(stack)
            use = await stack.enter_async_context(self.registry.use(call.model, call.keep_alive_s))
            messages = await brought_in(with_texts(use.listed, call.messages), self.settings, self._fetcher)
            decoders = ClientsDecoders(self.decoders, asking())
            options = {**self._limits, "decoders": decoders, **call.options}
            n_bytes, most = text_bytes([messages, options.get("tools")]), self.settings.max_tokenize_bytes
            if n_bytes > most:
                raise TooLarge(
                    f"The conversation has {n_bytes} bytes of text, at most {most} are tokenised; shorten it."
                )

            def build(gone: threading.Event) -> Prompt:
                return use.model.build_prompt(messages, **options, **Look(gone, self._stopping).everywhere())

            return await self._while_wanted(messages, options, build)

    def stop(self) -> None:
        """Cancel all answers and end the decoders; waiting clients learn that the server is shutting down."""
        self._stopping.set()
        self.decoders.close()
        for answering in [*self._running]:
            for stream in answering._streams:
                stream.cancel()

    def close(self) -> None:
        """End the threads and the decoders."""
        self._stopping.set()
        for threads in (self._texts, self._long):
            threads.shutdown(wait=False, cancel_futures=True)
        self.decoders.close()
