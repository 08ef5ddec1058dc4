"""The single inference thread: requests enter through a queue, events leave through an iterator.

Everything that computes runs here: numba's parallel kernels may be entered by one thread at a time, and a llama.cpp
context belongs to one thread. Callers prepare requests (decode pictures, render prompts) on their own threads. What
is computed when is decided by `scheduler`.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from edge_runtime.decoder import Decoder
from edge_runtime.encoder import ImageEncoder
from edge_runtime.errors import EdgeRuntimeError, EngineBusy
from edge_runtime.keeping import Keeping
from edge_runtime.requests import Activity, Event, EventQueue, Request, Task
from edge_runtime.scheduler import Scheduler
from edge_runtime.tokenizer import Tokenizer

MOST_REQUESTS = 64
"""Submitted and not finished; beyond it a request is refused rather than left to wait for minutes."""
PATIENCE, MOST_PATIENCE_S = 0.02, 0.02
"""Share of the time that a first request's prompt will take, and most seconds, in which others may join it."""
REST_AFTER_S = 0.2
"""Without a request; then memory is given back."""
R = TypeVar("R")


@dataclass
class _Call:
    """A function for the thread to run, and where its result goes."""

    function: Callable[[], Any]
    events: EventQueue = field(default_factory=EventQueue)


class Running:
    """A submitted request: take its events one by one, or cancel it. Forgetting it cancels it too."""

    def __init__(self, task: Task, cancelled: threading.Event) -> None:
        self._task, self._cancelled = task, cancelled

    def next_event(self) -> Event:
        """Wait for the next event; `Finished` is the last.

        A Ctrl-C while waiting loses nothing: the next call goes on.

        Raises
        ------
        EdgeRuntimeError
            When the request failed; no event follows.
        """
        event: Event = _checked(self._task.events.get())
        return event

    async def next_event_async(self) -> Event:
        """Wait for the next event in an event loop; otherwise as `next_event`."""
        event: Event = _checked(await self._task.events.get_async())
        return event

    def cancel(self) -> None:
        """End the request; its last event, sent at once, says `cancelled`. The engine leaves it as soon as it can."""
        self._cancelled.set()
        self._task.finish("cancelled")

    def __del__(self) -> None:
        """Nobody listens any more."""
        self.cancel()


def _checked(event: Any) -> Any:
    if isinstance(event, BaseException):
        raise event
    return event


class Engine:
    """Owns encoder and decoder, and the thread that runs them."""

    def __init__(
        self, encoder: ImageEncoder, decoder: Decoder, tokenizer: Tokenizer, keeping: Keeping | None = None
    ) -> None:
        self._decoder, self._keeping = decoder, keeping or Keeping()
        self._open: weakref.WeakSet[Task] = weakref.WeakSet()
        self._opening = threading.Lock()
        self._inbox: queue.SimpleQueue[Task | _Call | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._scheduler = Scheduler(encoder, decoder, tokenizer, self._keeping)
        self._thread = threading.Thread(
            target=_work, args=(self._inbox, self._scheduler), name="edge-runtime inference", daemon=True
        )
        self._thread.start()
        # Runs at exit too: a thread inside llama.cpp while the interpreter goes down would crash it.
        self._close = weakref.finalize(
            self, _shut_down, self._inbox, self._stopping, self._thread, decoder, self._keeping
        )

    def submit(self, request: Request) -> Running:
        """Queue a request.

        Raises
        ------
        PromptTooLongError
            When the prompt does not fit; nothing is computed then.
        EngineBusy
            When too many requests wait already.
        """
        self._decoder.check_length(len(request.prompt.ids))
        self._decoder.adapters.check(request.adapter)
        self._check_open()
        cancelled, stopping = threading.Event(), self._stopping
        task = Task(request, lambda: cancelled.is_set() or stopping.is_set())
        with self._opening:
            waiting = sum(not task.is_finished for task in self._open)
            if waiting >= MOST_REQUESTS:
                raise EngineBusy(f"{waiting} requests are waiting or running, which is the limit; try again later.")
            self._open.add(task)
        if self._keeping.prefixes is not None and not request.scores_prompt:
            task.keys = request.keys()
            adapter = self._decoder.adapters.identities[request.adapter]
            task.saved = self._keeping.prefixes.find(task.keys, adapter, self._scheduler.remembered(task))
        self._inbox.put(task)
        return Running(task, cancelled)

    def read_ahead(self, request: Request) -> Running:
        """Compute a prompt that will probably be asked for, as long as nobody asks for anything.

        Whatever comes first ends it; what was computed until then stays in the KV cache.

        Raises
        ------
        PromptTooLongError
            When the prompt does not fit.
        """
        self._decoder.check_length(len(request.prompt.ids))
        self._check_open()
        cancelled, stopping, inbox, scheduler = threading.Event(), self._stopping, self._inbox, self._scheduler
        task = Task(
            request,
            lambda: cancelled.is_set() or stopping.is_set() or not inbox.empty() or scheduler.n_tasks > 1,
        )
        inbox.put(task)
        return Running(task, cancelled)

    def submit_all(self, requests: Sequence[Request]) -> list[Running]:
        """Queue several requests, or none of them; otherwise as `submit`."""
        begun: list[Running] = []
        try:
            for request in requests:
                begun.append(self.submit(request))  # noqa: PERF401 - what precedes a refusal must be known
        except EdgeRuntimeError:
            for running in begun:  # not left to the collector: the exception keeps them alive
                running.cancel()
            raise
        return begun

    @property
    def activity(self) -> Activity:
        """What goes on now."""
        return self._scheduler.activity

    def call(self, function: Callable[[], R]) -> R:
        """Run a function on the inference thread and return its result; for work outside a request."""
        self._check_open()
        call = _Call(function)
        self._inbox.put(call)
        return _checked(call.events.get())[0]  # type: ignore[no-any-return]

    def _check_open(self) -> None:
        if not self._close.alive:
            raise EdgeRuntimeError("The model was closed; load it again with Model.load.")

    def close(self) -> None:
        """End all requests, stop the thread and free the model."""
        self._close()


def _work(inbox: queue.SimpleQueue[Task | _Call | None], scheduler: Scheduler) -> None:
    """Body of the thread. It must not refer to the engine, or that would never be collected."""
    while True:
        is_first, began = not scheduler.is_busy, 0.0
        while not scheduler.is_busy or not inbox.empty():
            item = _next_item(inbox, scheduler)
            if item is None:
                scheduler.close()
                return
            if isinstance(item, Task):
                began = began or time.perf_counter()
                scheduler.add(item)
            else:
                _run(item)
            del item
            if is_first and began:
                _await_company(inbox, scheduler, began)
        try:
            scheduler.turn()
        except Exception as error:  # noqa: BLE001 - a dead thread would leave every caller waiting for ever
            scheduler.fail_all(error)


def _next_item(inbox: queue.SimpleQueue[Task | _Call | None], scheduler: Scheduler) -> Task | _Call | None:
    """Wait for something to do; when nothing comes for a moment, the scheduler may rest."""
    try:
        return inbox.get(timeout=REST_AFTER_S)
    except queue.Empty:
        scheduler.rest()
        return inbox.get()


def _await_company(inbox: queue.SimpleQueue[Task | _Call | None], scheduler: Scheduler, began: float) -> None:
    """Let requests that come together begin together: a pass over the weights costs as much for one as for many."""
    ends = began + min(MOST_PATIENCE_S, PATIENCE * scheduler.waiting_s)
    while inbox.empty() and time.perf_counter() < ends:
        time.sleep(0.001)


def _run(call: _Call) -> None:
    try:
        call.events.put((call.function(),))
    except BaseException as error:  # noqa: BLE001 - handed to the caller, who raises it
        call.events.put(error)


def _shut_down(
    inbox: queue.SimpleQueue[Task | _Call | None],
    stopping: threading.Event,
    thread: threading.Thread,
    decoder: Decoder,
    keeping: Keeping,
) -> None:
    stopping.set()
    inbox.put(None)
    if thread is not threading.current_thread():
        thread.join()
    keeping.close()
    decoder.close()
