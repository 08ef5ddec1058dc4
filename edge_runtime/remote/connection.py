"""Requests to one server: sent from an event loop in a thread of its own, retried, timed and cancelled there.

What may pass is tried again with growing, random waits: a connection that fails, and the statuses 408, 425, 429, 500,
502, 503, 504, as long as nothing of an answer has arrived; `Retry-After` is obeyed. Once an answer has begun, a
break is an error that says what arrived: the beginning was shown, and another try would write another one. Redirects
are followed on the same host alone, so neither the key nor a picture ever goes elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from edge_runtime.engine.events import Event, EventQueue, Finished
from edge_runtime.errors import EndpointError, MessageError, PromptTooLongError
from edge_runtime.remote.address import KEY_VARIABLE, Address
from edge_runtime.remote.replies import Reader
from edge_runtime.system.forks import Home, only_here

BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 3
MAX_ERROR_BYTES = 1 << 16
MAX_LINE_BYTES = 64 << 20
"""Of one event; a whole reply without a stream has the same limit."""
SHOWN = 300
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 30.0
MAX_RETRY_AFTER_S = 120.0
"""Longer waits that a server asks for are errors that say so."""
_LONG = ("context_length_exceeded", "exceed_context_size_error")


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


class _Trouble(Exception):  # noqa: N818 - not an error yet
    """A failure that may pass."""

    def __init__(self, error: EndpointError, wait_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.wait_s = error, wait_s


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
        self._loop = _LoopThread(lambda: _client(address, patience))
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
            except _Trouble as trouble:
                if has_begun() or n_failed == self.patience.retries:
                    raise trouble.error from None
                if trouble.wait_s is not None and trouble.wait_s > MAX_RETRY_AFTER_S:
                    raise trouble.error from None
                await asyncio.sleep(_wait_s(n_failed, trouble.wait_s))
        raise AssertionError

    async def _get(self, client: httpx2.AsyncClient, url: str) -> Any:
        async with self._sent(client, "GET", url, None) as response:
            if response.status_code in (404, 405, 501):
                return None
            await self._check_status(response, None)
            body = await _limited(response, MAX_LINE_BYTES)
            try:
                return json.loads(body)
            except (ValueError, RecursionError):
                return None

    @contextlib.asynccontextmanager
    async def _sent(
        self, client: httpx2.AsyncClient, method: str, url: str, body: bytes | None
    ) -> AsyncIterator[httpx2.Response]:
        """The response to a request, its body not read yet."""
        host = self.address.host
        try:
            for _ in range(1 + MAX_REDIRECTS):
                request = client.build_request(method, url, content=body, headers=self._headers(body is not None))
                response = await client.send(request, stream=True)
                try:
                    if response.status_code not in REDIRECTS:
                        yield response
                        return
                    url = self._redirected(response)
                finally:
                    await response.aclose()
            raise EndpointError(f"{host} redirects more than {MAX_REDIRECTS} times; give the address it leads to.")
        except httpx2.ConnectTimeout:
            raise self._trouble(f"{host} did not accept a connection within {self.patience.connect_s:g} s") from None
        except httpx2.ProxyError as error:
            raise self._trouble(f"The proxy on the way to {host} refuses ({_reason(error)})") from None
        except httpx2.ConnectError as error:
            raise self._trouble(f"{host} cannot be reached ({_reason(error)})") from None
        except (httpx2.LocalProtocolError, httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
            raise EndpointError(
                f"A request to {host} cannot be made ({_reason(error)}); check the address."
            ) from None
        except httpx2.RequestError as error:
            raise self._trouble(f"The connection to {host} broke ({_reason(error)})") from None

    def _headers(self, has_body: bool) -> dict[str, str]:
        found = {"User-Agent": "edge-runtime", "Accept-Encoding": "identity"}
        if has_body:
            found["Content-Type"] = "application/json"
        if self.address.key is not None:
            found["Authorization"] = f"Bearer {self.address.key}"
        return found

    def _redirected(self, response: httpx2.Response) -> str:
        """Where a redirect leads, if that is the same host and the request stays the same."""
        location, base = response.headers.get("location", ""), self.address.base
        try:
            url = response.url.join(location)
            is_same = (url.scheme, url.host, url.port) == (base.scheme, base.host, base.port)
        except (httpx2.InvalidURL, ValueError):
            is_same = False
        if not is_same or response.status_code not in (307, 308):
            raise EndpointError(
                f"{self.address.host} redirects to {location.rpartition('@')[2][:80]!r}, which is not followed: "
                f"the key "
                "and the pictures are for the server that was named; give the address it leads to.",
                status=response.status_code,
            )
        return str(url)

    def _trouble(
        self, what: str, received: str = "", wait_s: float | None = None, status: int | None = None
    ) -> _Trouble:
        error = EndpointError(
            f"{what}; check that the server runs, or try again later.",
            status=status,
            received=received,
            may_pass=True,
        )
        return _Trouble(error, wait_s)

    async def _check_status(self, response: httpx2.Response, reader: Reader | None) -> None:
        status = response.status_code
        if 200 <= status < 300:
            return
        said = _said(await _limited(response, MAX_ERROR_BYTES))
        raise self._refused(status, said, _retry_after_s(response.headers.get("retry-after")))

    def _refused(self, status: int, said: tuple[str, str], wait_s: float | None) -> Exception:
        """What a status and an error's text mean."""
        (text, code), host = said, self.address.host
        text = self._hide(text) or f"status {status} without an explanation"
        if code in _LONG or "maximum context length" in text:
            return PromptTooLongError(f"{host} says: {text}")
        if status in (401, 403):
            known = "none was sent" if self.address.key is None else "the one that was sent is refused"
            return EndpointError(
                f"{host} wants a key, and {known} ({text}); put it into {KEY_VARIABLE}.", status=status
            )
        if status in BUSY:
            wait = f"; it asks to wait {wait_s:g} s" if wait_s is not None else ""
            error = EndpointError(
                f"{host} has no answer now (status {status}): {text}{wait}.", status=status, may_pass=True
            )
            return _Trouble(error, wait_s)
        return EndpointError(f"{host} refuses the request (status {status}): {text}", status=status)

    def _hide(self, text: str) -> str:
        """A text of the server without the key, should it repeat that."""
        return text if self.address.key is None else text.replace(self.address.key, "***")

    async def _stream(self, client: httpx2.AsyncClient, body: bytes, reader: Reader, events: EventQueue) -> None:
        """One attempt at an answer."""
        patience, host, begun = self.patience, self.address.host, time.monotonic()
        url = f"{self.address}/chat/completions"

        def left_s() -> float:
            return patience.between_s if reader.has_begun else begun + patience.first_token_s - time.monotonic()

        try:
            async with asyncio.timeout(left_s()) as limit:
                async with self._sent(client, "POST", url, body) as response:
                    await self._check_status(response, reader)
                    is_stream = "text/event-stream" in response.headers.get("content-type", "")
                    lines = _events(response) if is_stream else _whole(response)
                    async for data in lines:
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
        except _Trouble as trouble:
            if not reader.has_begun:
                raise
            raise EndpointError(
                f"{str(trouble.error).split(';')[0]}{reader.so_far()}.", received=reader.received, may_pass=True
            ) from None
        if not reader.has_ended:
            what = f"{host} ended the answer without saying why"
            if reader.has_begun:
                raise EndpointError(f"{what}{reader.so_far()}.", received=reader.received, may_pass=True)
            raise self._trouble(what)
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
            refused = self._refused(status if isinstance(status, int) else 500, _said(data), None)
            if reader.has_begun and isinstance(refused, EndpointError):
                refused = EndpointError(
                    f"{refused}{reader.so_far()}.", status=refused.status, received=reader.received
                )
            raise refused
        for piece in reader.feed(chunk):
            events.put(piece)


def _client(address: Address, patience: Patience) -> httpx2.AsyncClient:
    """A client without limits of its own but for a connection.

    A proxy of the environment is not for this machine.
    """
    return httpx2.AsyncClient(
        timeout=httpx2.Timeout(None, connect=patience.connect_s),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=patience.parallel),
        follow_redirects=False,
        trust_env=not address.is_loopback,
    )


def _wait_s(n_failed: int, asked_s: float | None) -> float:
    """Seconds before the next attempt: what the server asks for, or a random part of a growing time."""
    most = min(MAX_WAIT_S, FIRST_WAIT_S * 2**n_failed)
    jitter = random.uniform(0.5, 1.0)
    return most * jitter if asked_s is None else asked_s + FIRST_WAIT_S * (jitter - 0.5)


def _retry_after_s(text: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or a date."""
    if not text:
        return None
    try:
        return max(0.0, float(int(text)))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


async def _limited(response: httpx2.Response, most: int) -> bytes:
    """The body, or as much of it as is allowed."""
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > most:
            break
    return bytes(body[:most])


async def _whole(response: httpx2.Response) -> AsyncIterator[bytes]:
    """A reply of a server that does not stream."""
    yield await _limited(response, MAX_LINE_BYTES)


async def _events(response: httpx2.Response) -> AsyncIterator[bytes]:
    """Data of a stream's events, one line each; comments and other fields are empty: signs of life.

    Lines end with a line feed; characters like U+2028, which are line ends elsewhere, may be part of a text.
    """
    rest = bytearray()
    async for chunk in response.aiter_raw():
        rest += chunk
        *lines, last = rest.split(b"\n")
        for line in (bytes(line).strip() for line in lines):
            for field in (
                b"data:",
                b"error:",
            ):  # older versions of llama-server write errors into a field of their own
                if line.startswith(field):
                    text = line[len(field) :].strip()
                    yield text if field == b"data:" else b'{"error": ' + text + b"}"
                    break
            else:
                yield b""
        rest = bytearray(last)
        if len(rest) > MAX_LINE_BYTES:
            raise EndpointError(f"The server sent an event of more than {MAX_LINE_BYTES} bytes; that is no answer.")


def _said(body: bytes) -> tuple[str, str]:
    """The text and the code of an error, in any of the forms that servers have."""
    try:
        found: Any = json.loads(body)
    except (ValueError, RecursionError):
        return _cut(body.decode("utf-8", "replace")), ""
    if not isinstance(found, Mapping):
        return _cut(str(found)), ""
    error = found.get("error", found)
    if not isinstance(error, Mapping):
        return _cut(str(error)), ""
    text = error.get("message") or error.get("detail") or json.dumps(error)
    code = error.get("code")
    return _cut(text if isinstance(text, str) else json.dumps(text)), str(
        error.get("type") if isinstance(code, int) else code
    )


def _cut(text: str) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _reason(error: Exception) -> str:
    return _cut(str(error)) or type(error).__name__
