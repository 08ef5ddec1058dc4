"""Requests to one server: sent from an event loop in a thread of its own, retried, timed and cancelled there.

What may pass is tried again with growing, random waits: a connection that fails, and the statuses 408, 425, 429, 500,
502, 503, 504, as long as nothing of an answer has arrived; `Retry-After` is obeyed. Once an answer has begun, a
break is an error that says what arrived: the beginning was shown, and another try would write another one. A single
request and its response are `exchange`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import httpx2

from edge_runtime.engine.events import Event, EventQueue, Finished
from edge_runtime.errors import EndpointError, MessageError
from edge_runtime.remote.address import Address
from edge_runtime.remote.exchange import MAX_LINE_BYTES, Exchange, Trouble, data_of, limited
from edge_runtime.remote.replies import Reader
from edge_runtime.system.forks import Home, only_here

FIRST_WAIT_S, MAX_WAIT_S = 0.5, 30.0
MAX_RETRY_AFTER_S = 120.0
"""Longer waits that a server asks for are errors that say so."""


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds, and how often to try."""

    connect_s: float = 10.0
    first_token_s: float = 1800.0
    """From sending to the first piece: a queue, pictures and the prompt."""
    between_s: float = 300.0
    """Without a sign of life once the answer has begun."""
    retries: int = 4
    parallel: int = 16
    """Requests at the same time; further ones wait here."""

    def checked(self) -> Patience:
        """Return it, or name the number that is out of range.

        Raises
        ------
        MessageError
        """
        for name, value in vars(self).items():
            counts = name in ("retries", "parallel")
            low = 0 if name == "retries" else 1 if counts else 1e-3
            if isinstance(value, bool) or not isinstance(value, int if counts else int | float) or not value >= low:
                raise MessageError(f"{name} is {value!r}; expected a {'whole ' if counts else ''}number from {low}.")
        return self


class _LoopThread:
    """An event loop in a thread, started with the first request. Has no reference to who uses it."""

    def __init__(self, client: Callable[[], httpx2.AsyncClient]) -> None:
        self._make_client, self._lock = client, threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._client: httpx2.AsyncClient | None = None
        self._is_closed = False

    def run(self, work: Callable[[httpx2.AsyncClient], Coroutine[Any, Any, None]]) -> Future[None]:
        """Start work; the future cancels it."""
        with self._lock:
            if self._is_closed:
                raise MessageError("The connection to the server was closed; connect again.")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="edge-runtime remote", daemon=True
                )
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(self._with_client(work), self._loop)

    async def _with_client(self, work: Callable[[httpx2.AsyncClient], Coroutine[Any, Any, None]]) -> None:
        if self._client is None:
            self._client = self._make_client()
        await work(self._client)

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._lock:
            self._is_closed = True
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return
        done = asyncio.run_coroutine_threadsafe(self._end(), loop)
        if thread is not threading.current_thread():
            with contextlib.suppress(Exception):
                done.result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            if not thread.is_alive():
                loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()


class RemoteRunning:
    """An answer that a server writes; an `answers.Running`. Dropping the last reference cancels it."""

    def __init__(self, events: EventQueue, future: Future[None], n_pieces: Callable[[], int]) -> None:
        self._events, self._future, self._n_pieces, self._home = events, future, n_pieces, Home()

    def next_event(self) -> Event:
        """Wait for the next event; `Finished` is the last, unless the answer fails."""
        self._home.check()
        return _checked(self._events.get())

    async def next_event_async(self) -> Event:
        """As `next_event`, but wait in an event loop."""
        self._home.check()
        return _checked(await self._events.get_async())

    def cancel(self) -> None:
        """Close the connection; the last event (`cancelled`) comes at once."""
        if self._home.is_here and not self._events.is_closed:
            self._events.put_last(Finished("cancelled", self._n_pieces(), 0, {"first_token": 0.0, "decode": 0.0}))
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._future.cancel()

    def __del__(self) -> None:
        """Cancel: nobody reads the events any more."""
        self.cancel()


def _checked(event: Any) -> Event:
    if isinstance(event, BaseException):
        raise event
    found: Event = event
    return found


class Connection:
    """The way to one server.

    Parameters
    ----------
    title : of the server, for errors.
    """

    def __init__(self, address: Address, patience: Patience) -> None:
        self.address, self.patience = address, patience.checked()
        self._places = asyncio.Semaphore(patience.parallel)
        self._exchange = Exchange(address, patience.connect_s, patience.parallel)
        self._loop = _LoopThread(self._exchange.client)
        weakref.finalize(self, only_here(self._loop.close))

    def close(self) -> None:
        """Cancel all answers and close all connections."""
        self._loop.close()

    def get(self, url: str) -> Any:
        """JSON from an address of the server; None if it has no such route.

        Raises
        ------
        EndpointError
            When there is no server, or it refuses.
        """
        found: list[Any] = []

        async def ask(client: httpx2.AsyncClient) -> None:
            found.append(await self._retried(lambda: self._get(client, url), lambda: False))

        self._loop.run(ask).result()
        return found[0]

    def answer(self, body: bytes, reader: Reader) -> RemoteRunning:
        """Send a request for an answer; returns at once."""
        events = EventQueue()

        async def ask(client: httpx2.AsyncClient) -> None:
            try:
                async with self._places:
                    await self._retried(lambda: self._stream(client, body, reader, events), lambda: reader.has_begun)
                events.put_last(reader.finished())
            except asyncio.CancelledError:
                events.put_last(Finished("cancelled", reader.n_pieces, 0, {"first_token": 0.0, "decode": 0.0}))
                raise
            except Exception as error:  # noqa: BLE001 - raised where the answer is read
                events.put_last(error)

        return RemoteRunning(events, self._loop.run(ask), lambda: reader.n_pieces)

    async def _retried(self, attempt: Callable[[], Coroutine[Any, Any, Any]], has_begun: Callable[[], bool]) -> Any:
        """Make attempts until one succeeds, or another one makes no sense."""
        for n_failed in range(self.patience.retries + 1):
            try:
                return await attempt()
            except Trouble as trouble:
                if has_begun() or n_failed == self.patience.retries:
                    raise trouble.error from None
                if trouble.wait_s is not None and trouble.wait_s > MAX_RETRY_AFTER_S:
                    raise trouble.error from None
                await asyncio.sleep(_wait_s(n_failed, trouble.wait_s))
        raise AssertionError

    async def _get(self, client: httpx2.AsyncClient, url: str) -> Any:
        async with self._exchange.sent(client, "GET", url, None) as response:
            if response.status_code in (404, 405, 501):
                return None
            await self._exchange.check_status(response)
            body = await limited(response, MAX_LINE_BYTES)
            try:
                return json.loads(body)
            except (ValueError, RecursionError):
                return None

    async def _stream(self, client: httpx2.AsyncClient, body: bytes, reader: Reader, events: EventQueue) -> None:
        """One attempt at an answer."""
        patience, host, begun = self.patience, self.address.host, time.monotonic()
        url = f"{self.address}/chat/completions"

        def left_s() -> float:
            return patience.between_s if reader.has_begun else begun + patience.first_token_s - time.monotonic()

        try:
            async with asyncio.timeout(left_s()) as limit:
                async with self._exchange.sent(client, "POST", url, body) as response:
                    await self._exchange.check_status(response)
                    async for data in data_of(response):
                        if data == b"[DONE]":
                            break
                        self._take(data, reader, events)
                        limit.reschedule(asyncio.get_running_loop().time() + left_s())
        except TimeoutError:
            waited = patience.between_s if reader.has_begun else patience.first_token_s
            raise EndpointError(
                f"{host} sent nothing for {waited:g} s{reader.so_far()}; ask for less, or wait longer.",
                received=reader.received,
                may_pass=True,
            ) from None
        except Trouble as trouble:
            if not reader.has_begun:
                raise
            raise EndpointError(
                f"{str(trouble.error).split(';')[0]}{reader.so_far()}.", received=reader.received, may_pass=True
            ) from None
        if not reader.has_ended:
            what = f"{host} ended the answer without saying why"
            if reader.has_begun:
                raise EndpointError(f"{what}{reader.so_far()}.", received=reader.received, may_pass=True)
            raise self._exchange.trouble(what)
        for piece in reader.end():
            events.put(piece)

    def _take(self, data: bytes, reader: Reader, events: EventQueue) -> None:
        """Read one event of a stream."""
        if not data:  # a sign of life
            return
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            raise EndpointError(
                f"{self.address.host} sent something that is not JSON ({data[:60].decode('utf-8', 'replace')!r})"
                f"{reader.so_far()}; is it a server with OpenAI's API?",
                received=reader.received,
            ) from None
        if isinstance(chunk, Mapping) and chunk.get("error"):
            error = chunk["error"]
            status = error.get("code") if isinstance(error, Mapping) else None
            refused = self._exchange.refused(status if isinstance(status, int) else 500, data)
            if reader.has_begun and isinstance(refused, EndpointError):
                refused = EndpointError(
                    f"{refused}{reader.so_far()}.", status=refused.status, received=reader.received
                )
            raise refused
        for piece in reader.feed(chunk):
            events.put(piece)


def _wait_s(n_failed: int, asked_s: float | None) -> float:
    """Seconds before the next attempt: what the server asks for, or a random part of a growing time."""
    most = min(MAX_WAIT_S, FIRST_WAIT_S * 2**n_failed)
    jitter = random.uniform(0.5, 1.0)
    return most * jitter if asked_s is None else asked_s + FIRST_WAIT_S * (jitter - 0.5)
