"""The single inference thread: requests enter through a queue, events leave through an iterator.

Everything that computes runs here: numba's parallel kernels may be entered by one thread at a time, and a llama.cpp
context belongs to one thread. Callers prepare requests (decode pictures, render prompts) on their own threads.
`scheduler` decides what is computed when.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from edge_runtime.cache.caches import Caches
from edge_runtime.decoder.decoder import Decoder
from edge_runtime.engine.events import Activity, Event, EventQueue
from edge_runtime.engine.request import Request
from edge_runtime.engine.scheduler import Scheduler
from edge_runtime.engine.task import Task
from edge_runtime.engine.warm_up import expected_prefixes
from edge_runtime.errors import EdgeRuntimeError, EngineBusy
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.system.forks import Home, only_here
from edge_runtime.vision.encoder import ImageEncoder

MAX_REQUESTS = 64
"""Submitted and not finished; more are refused rather than left to wait for minutes."""
BATCH_WINDOW_SHARE, BATCH_WINDOW_MAX_S = 0.02, 0.02
"""How long others may join a first request: share of the time that its prompt will take, and maximum in seconds."""
IDLE_AFTER_S = 0.2
"""Time without a request after which memory is given back."""
SAVE_PAUSE_S = 0.02
"""Pause between checks for more to save."""
HELD_PAUSE_S = 0.02
"""Pause between looks whether tasks that give way may go on."""
R = TypeVar("R")


@dataclass
class _Call:
    """A function to run on the thread, and where its result goes."""

    function: Callable[[], Any]
    events: EventQueue = field(default_factory=EventQueue)


class _Inbox:
    """What the thread has to do, in order. Nothing is accepted after the end, where it would wait forever."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Task | _Call | None] = queue.SimpleQueue()
        self._is_open, self._lock, self._home = True, threading.Lock(), Home()
        self.n_urgent = 0
        """Things to do in it, apart from tasks that give way."""

    def put(self, item: Task | _Call) -> None:
        self._home.check()
        with self._lock:
            self.check_open()
            self.n_urgent += _is_urgent(item)
            self._queue.put(item)

    def check_open(self) -> None:
        self._home.check()
        if not self._is_open:
            raise EdgeRuntimeError("The model was closed; load it again with Model.load.")

    def close(self) -> None:
        with self._lock:
            self._is_open = False
            self.n_urgent += 1
            self._queue.put(None)

    def get(self, timeout: float | None = None) -> Task | _Call | None:
        item = self._queue.get(timeout=timeout)
        with self._lock:
            self.n_urgent -= _is_urgent(item)
        return item

    def empty(self) -> bool:
        return self._queue.empty()


def _is_urgent(item: Task | _Call | None) -> bool:
    return not (isinstance(item, Task) and item.gives_way)


class Running:
    """A submitted request: take its events one by one, or cancel it. Dropping the last reference cancels it too."""

    def __init__(self, task: Task, cancelled: threading.Event) -> None:
        self._task, self._cancelled, self._home = task, cancelled, Home()

    def next_event(self) -> Event:
        """Wait for the next event; `Finished` is the last.

        Ctrl-C while waiting loses nothing: the next call continues.

        Raises
        ------
        EdgeRuntimeError
            When the request failed; no event follows.
        """
        self._home.check()
        event: Event = _checked(self._task.events.get())
        return event

    async def next_event_async(self) -> Event:
        """As `next_event`, but wait in an event loop."""
        self._home.check()
        event: Event = _checked(await self._task.events.get_async())
        return event

    def cancel(self) -> None:
        """End the request; the last event (`cancelled`) is sent at once, the engine drops it as soon as it can."""
        if self._home.is_here:
            self._cancelled.set()
            self._task.finish("cancelled")

    def __del__(self) -> None:
        """Cancel: nobody reads the events any more."""
        self.cancel()


def _checked(event: Any) -> Any:
    if isinstance(event, BaseException):
        raise event
    return event


class Engine:
    """Owns the encoder, the decoder and the thread that runs them.

    Tests and benchmarks look inside through `encoder`, `decoder`, `scheduler`, `inbox`, `caches` and `thread`, and
    run code on the inference thread with `run`; none of that is stable.
    """

    def __init__(
        self, encoder: ImageEncoder, decoder: Decoder, tokenizer: Tokenizer, caches: Caches | None = None
    ) -> None:
        self.encoder, self.decoder = encoder, decoder
        self.caches = caches or Caches()
        self._open: weakref.WeakSet[Task] = weakref.WeakSet()
        self._opening = threading.Lock()
        self.inbox = _Inbox()
        self._stopping = threading.Event()
        self.scheduler = Scheduler(encoder, decoder, tokenizer, self.caches)
        inbox = self.inbox
        self.scheduler.has_arrivals = lambda: inbox.n_urgent > 0
        self.thread = threading.Thread(
            target=_work, args=(self.inbox, self.scheduler), name="edge-runtime inference", daemon=True
        )
        self.thread.start()
        # Runs at exit too: a thread still inside llama.cpp while the interpreter shuts down would crash it.
        self._close = weakref.finalize(
            self, only_here(_shut_down), self.inbox, self._stopping, self.thread, decoder, self.caches
        )

    def check_open(self) -> None:
        """Raise `EdgeRuntimeError` if there is no thread: the engine is closed or belongs to a parent process."""
        self.inbox.check_open()

    def submit(self, request: Request) -> Running:
        """Queue a request.

        Raises
        ------
        PromptTooLongError
            When the prompt does not fit; nothing is computed.
        EngineBusy
            When too many requests are waiting.
        """
        self.check_open()
        self.decoder.check_length(len(request.prompt.ids))
        self.decoder.adapters.check(request.options.adapter)
        cancelled, stopping = threading.Event(), self._stopping
        task = Task(request, lambda: cancelled.is_set() or stopping.is_set(), keys=request.keys())
        with self._opening:  # those that give way take nobody's place
            waiting = sum(not other.events.is_closed for other in self._open if other.gives_way == task.gives_way)
            if waiting >= MAX_REQUESTS:
                raise EngineBusy(f"{waiting} requests are waiting or running, which is the limit; try again later.")
            self._open.add(task)
        if self.caches.prefixes is not None and request.options.reuse and not request.scores_prompt:
            adapter = self.decoder.adapters.identities[request.options.adapter]
            task.saved = self.caches.prefixes.find(task.keys, adapter, self.scheduler.remembered(task))
        self.inbox.put(task)
        return Running(task, cancelled)

    def prefetch(self, request: Request) -> Running:
        """Compute a prompt that will probably be requested, while the engine is idle.

        Any other request ends it; what was computed by then stays in the KV cache.

        Raises
        ------
        PromptTooLongError
            When the prompt does not fit.
        """
        self.decoder.check_length(len(request.prompt.ids))
        cancelled, stopping, inbox, scheduler = threading.Event(), self._stopping, self.inbox, self.scheduler
        task = Task(
            request,
            lambda: cancelled.is_set() or stopping.is_set() or inbox.n_urgent > 0 or scheduler.n_urgent > 1,
            keys=request.keys(),
        )
        inbox.put(task)
        return Running(task, cancelled)

    def warm_up(self) -> None:
        """Compute the prefixes that chats shared in the last run while idle; returns at once."""
        prefixes = self.caches.prefixes
        if prefixes is None or not prefixes.is_usable:
            return
        adapters = {identity: name for name, identity in self.decoder.adapters.identities.items()}
        n_ctx, inbox, scheduler = self.decoder.n_ctx, self.inbox, self.scheduler

        def look() -> None:
            """Check what is on disk while requests run; the scheduler decides what to use of it."""
            expected = expected_prefixes(prefixes, adapters, n_ctx)
            with contextlib.suppress(EdgeRuntimeError):  # closed meanwhile
                inbox.put(_Call(lambda: scheduler.warm_up.add(expected)))

        threading.Thread(target=look, name="edge-runtime warm-up", daemon=True).start()

    def submit_all(self, requests: Sequence[Request]) -> list[Running]:
        """Queue several requests, or none of them; otherwise like `submit`."""
        begun: list[Running] = []
        try:
            for request in requests:
                begun.append(self.submit(request))  # noqa: PERF401 - those before a refusal must be known
        except EdgeRuntimeError:
            for running in begun:  # not left to the garbage collector: the exception keeps them alive
                running.cancel()
            raise
        return begun

    @property
    def activity(self) -> Activity:
        """Current load."""
        return self.scheduler.activity

    def run(self, function: Callable[[], R]) -> R:
        """Run a function on the inference thread and return its result; for work outside of requests."""
        call = _Call(function)
        self.inbox.put(call)
        return _checked(call.events.get())[0]  # type: ignore[no-any-return]

    def close(self) -> None:
        """End all requests, stop the thread and free the model."""
        self._close()


def _work(inbox: _Inbox, scheduler: Scheduler) -> None:
    """Body of the thread. It must not refer to the engine, which would then never be collected."""
    while True:
        is_first, began = not scheduler.is_busy, 0.0
        while not scheduler.is_busy or not inbox.empty():
            item = _next_item(inbox, scheduler)
            if item is None:
                scheduler.close()
                return
            if isinstance(item, Task):
                began = began or time.perf_counter()
                _add(item, scheduler)
            else:
                _run(item)
            del item
            if is_first and began:
                _wait_for_batch(inbox, scheduler, began)
        try:
            scheduler.step()
        except Exception as error:  # noqa: BLE001 - a dead thread would leave every caller waiting forever
            scheduler.fail_all(error)


def _add(task: Task, scheduler: Scheduler) -> None:
    """Add a task; an error fails only this task."""
    try:
        scheduler.add(task)
    except Exception as error:  # noqa: BLE001 - reported to the caller
        task.fail(error)


def _next_item(inbox: _Inbox, scheduler: Scheduler) -> Task | _Call | None:
    """Wait for work; after a moment without any, release memory and do what was put off."""
    while scheduler.n_tasks:  # all of them are held: what may be done meanwhile is not ours to know
        with contextlib.suppress(queue.Empty):
            return inbox.get(timeout=HELD_PAUSE_S)
        if scheduler.is_busy:
            return _Call(lambda: None)
    try:
        return inbox.get(timeout=IDLE_AFTER_S)
    except queue.Empty:
        scheduler.release_idle_memory()
    while scheduler.save_more():
        with contextlib.suppress(queue.Empty):
            return inbox.get(timeout=SAVE_PAUSE_S)
    return scheduler.expected_task(lambda: inbox.n_urgent > 0) or inbox.get()


def _wait_for_batch(inbox: _Inbox, scheduler: Scheduler, began: float) -> None:
    """Start requests that arrive together in one batch: a pass over the weights costs as much for one as for many."""
    ends = began + min(BATCH_WINDOW_MAX_S, BATCH_WINDOW_SHARE * scheduler.waiting_s)
    while inbox.empty() and time.perf_counter() < ends:
        time.sleep(0.001)


def _run(call: _Call) -> None:
    try:
        call.events.put((call.function(),))
    except BaseException as error:  # noqa: BLE001 - reported to the caller, who raises it
        call.events.put(error)


def _shut_down(
    inbox: _Inbox,
    stopping: threading.Event,
    thread: threading.Thread,
    decoder: Decoder,
    caches: Caches,
) -> None:
    stopping.set()
    inbox.close()
    if thread is not threading.current_thread():
        thread.join()
    caches.close()
    decoder.close()
