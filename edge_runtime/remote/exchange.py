"""One request to a server and its response: what is sent, where redirects may lead, and what failures mean.

Redirects are followed on the same host alone, so neither the key nor a picture ever goes elsewhere. A failure that
may pass is a `Trouble`; `connection` tries again.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from edge_runtime.errors import EndpointError, PromptTooLongError
from edge_runtime.remote.address import KEY_VARIABLE, Address

BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 3
MAX_ERROR_BYTES = 1 << 16
MAX_LINE_BYTES = 64 << 20
"""Of one event; a whole reply without a stream has the same limit."""
SHOWN = 300
_LONG = ("context_length_exceeded", "exceed_context_size_error")


class Trouble(Exception):  # noqa: N818 - not an error yet
    """A failure that may pass."""

    def __init__(self, error: EndpointError, wait_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.wait_s = error, wait_s


class Exchange:
    """Requests to one server, and their responses.

    Parameters
    ----------
    connect_s : longest time for a connection, in seconds.
    n_kept : connections that stay open between requests, at most.
    """

    def __init__(self, address: Address, connect_s: float, n_kept: int) -> None:
        self._address, self._connect_s, self._n_kept = address, connect_s, n_kept

    def client(self) -> httpx2.AsyncClient:
        """Make a client without limits of its own but for a connection.

        A proxy of the environment is not for this machine.
        """
        return httpx2.AsyncClient(
            timeout=httpx2.Timeout(None, connect=self._connect_s),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=self._n_kept),
            follow_redirects=False,
            trust_env=not self._address.is_loopback,
        )

    @contextlib.asynccontextmanager
    async def sent(
        self, client: httpx2.AsyncClient, method: str, url: str, body: bytes | None
    ) -> AsyncIterator[httpx2.Response]:
        """The response to a request, its body not read yet."""
        host = self._address.host
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
            raise self.trouble(f"{host} did not accept a connection within {self._connect_s:g} s") from None
        except httpx2.ProxyError as error:
            raise self.trouble(f"The proxy on the way to {host} refuses ({_reason(error)})") from None
        except httpx2.ConnectError as error:
            raise self.trouble(f"{host} cannot be reached ({_reason(error)})") from None
        except (httpx2.LocalProtocolError, httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
            raise EndpointError(
                f"A request to {host} cannot be made ({_reason(error)}); check the address."
            ) from None
        except httpx2.RequestError as error:
            raise self.trouble(f"The connection to {host} broke ({_reason(error)})") from None

    def _headers(self, has_body: bool) -> dict[str, str]:
        found = {"User-Agent": "edge-runtime", "Accept-Encoding": "identity"}
        if has_body:
            found["Content-Type"] = "application/json"
        if self._address.key is not None:
            found["Authorization"] = f"Bearer {self._address.key}"
        return found

    def _redirected(self, response: httpx2.Response) -> str:
        """Where a redirect leads, if that is the same host and the request stays the same."""
        location, base = response.headers.get("location", ""), self._address.base
        try:
            url = response.url.join(location)
            is_same = (url.scheme, url.host, url.port) == (base.scheme, base.host, base.port)
        except (httpx2.InvalidURL, ValueError):
            is_same = False
        if not is_same or response.status_code not in (307, 308):
            raise EndpointError(
                f"{self._address.host} redirects to {location.rpartition('@')[2][:80]!r}, which is not followed: "
                "the key and the pictures are for the server that was named; give the address it leads to.",
                status=response.status_code,
            )
        return str(url)

    def trouble(self, what: str) -> Trouble:
        """A failure that may pass, with what to do about it."""
        return Trouble(EndpointError(f"{what}; check that the server runs, or try again later.", may_pass=True))

    async def check_status(self, response: httpx2.Response) -> None:
        """Raise what a status and the text of its response mean, unless it is a success."""
        status = response.status_code
        if 200 <= status < 300:
            return
        body = await limited(response, MAX_ERROR_BYTES)
        raise self.refused(status, body, retry_after_s(response.headers.get("retry-after")))

    def refused(self, status: int, body: bytes, wait_s: float | None = None) -> Exception:
        """What a status and the body of an error mean."""
        (text, code), host = _said(body), self._address.host
        text = self._hide(text) or f"status {status} without an explanation"
        if code in _LONG or "maximum context length" in text:
            return PromptTooLongError(f"{host} says: {text}")
        if status in (401, 403):
            known = "none was sent" if self._address.key is None else "the one that was sent is refused"
            return EndpointError(
                f"{host} wants a key, and {known} ({text}); put it into {KEY_VARIABLE}.", status=status
            )
        if status in BUSY:
            wait = f"; it asks to wait {wait_s:g} s" if wait_s is not None else ""
            error = EndpointError(
                f"{host} has no answer now (status {status}): {text}{wait}.", status=status, may_pass=True
            )
            return Trouble(error, wait_s)
        return EndpointError(f"{host} refuses the request (status {status}): {text}", status=status)

    def _hide(self, text: str) -> str:
        """A text of the server without the key, should it repeat that."""
        return text if self._address.key is None else text.replace(self._address.key, "***")


def retry_after_s(text: str | None) -> float | None:
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


def data_of(response: httpx2.Response) -> AsyncIterator[bytes]:
    """Data of a stream's events, or the whole reply of a server that does not stream; empty is a sign of life."""
    is_stream = "text/event-stream" in response.headers.get("content-type", "")
    return _events(response) if is_stream else _whole(response)


async def limited(response: httpx2.Response, most: int) -> bytes:
    """The body, or as much of it as is allowed."""
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > most:
            break
    return bytes(body[:most])


async def _whole(response: httpx2.Response) -> AsyncIterator[bytes]:
    yield await limited(response, MAX_LINE_BYTES)


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
