"""The address of a picture in a request → its bytes, if the owner allows the host; nothing else is ever contacted.

The rules are those of `addresses`, which hold for models, too: only http and https, only hosts of `--allow-url`, only
their standard ports unless one is named there, and only addresses of the public internet, unless the owner
named the address itself. A name is resolved once; all its addresses are checked, and the connection goes to
a checked address, so a name that resolves differently the second time gains nothing. Redirects pass
the same checks. Bytes, seconds and redirects are limited; nothing is decompressed; no proxy and no cookie is used.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from typing import Any

import httpcore2
import httpx2

from edge_runtime.errors import ImageError
from edge_runtime.server.errors import NotAllowed
from edge_runtime.server.settings import Settings
from edge_runtime.system.addresses import PORTS, Address, Allowed, is_public

MAX_REDIRECTS = 3
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_SHOWN = 80  # characters of an address in an error


class Fetcher:
    """Fetches the pictures of requests.

    Parameters
    ----------
    settings : uses `allow_url` and `fetch_timeout_s`.
    """

    def __init__(self, settings: Settings) -> None:
        self._allowed = [Allowed.parse(text) for text in settings.allow_url]
        self._timeout_s = settings.fetch_timeout_s
        self._tls: ssl.SSLContext | None = None

    async def fetch(self, address: str, max_bytes: int) -> bytes:
        """Fetch the bytes at an address.

        Raises
        ------
        NotAllowed
            When the address, or one it redirects to, may not be fetched; nothing was sent there.
        ImageError
            When the server does not deliver, is too slow, or sends too much.
        """
        shown = address[:_SHOWN]
        url = self._checked(address)
        try:
            async with asyncio.timeout(self._timeout_s):
                for _ in range(1 + MAX_REDIRECTS):
                    found = await self._get(url, shown, max_bytes)
                    if isinstance(found, bytes):
                        return found
                    url = self._checked(_joined(url, found, shown))
        except TimeoutError:
            raise ImageError(
                f"{shown!r} did not arrive within {self._timeout_s:g} s, which is the limit; send the picture itself."
            ) from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError) as error:
            raise ImageError(
                f"{shown!r} cannot be fetched ({type(error).__name__}); check it, or send the picture itself."
            ) from None
        raise ImageError(f"{shown!r} redirects more than {MAX_REDIRECTS} times; give the picture's own address.")

    def _checked(self, address: str) -> httpx2.URL:
        """Return the address if its scheme, host and port are allowed."""
        if not self._allowed:
            raise NotAllowed(
                f"The picture is the address {address[:_SHOWN]!r}, and this server fetches none; send it as a data: "
                "URI, or ask its owner for --allow-url."
            )
        try:
            url = httpx2.URL(address)
            acceptable = url.scheme in PORTS and bool(url.host) and not url.userinfo
        except (httpx2.InvalidURL, ValueError, TypeError):
            acceptable = False
        if not acceptable:
            raise NotAllowed(
                f"The picture has the address {address[:_SHOWN]!r}; expected http:// or https:// with a host and "
                "without a user, or a data: URI."
            )
        if not any(allowed.covers(url) for allowed in self._allowed):
            raise NotAllowed(
                f"{address[:_SHOWN]!r} is not on a host that this server may fetch from; send the picture as a data: "
                "URI, or ask the server's owner to add the host to --allow-url."
            )
        return url

    async def _get(self, url: httpx2.URL, shown: str, max_bytes: int) -> bytes | str:
        """The bytes of a picture, or the address its server redirects to."""
        host = url.netloc.decode("ascii")
        headers = [("Host", host), ("User-Agent", "edge-runtime"), ("Accept", "*/*"), ("Accept-Encoding", "identity")]
        if url.scheme == "https" and self._tls is None:
            self._tls = await asyncio.to_thread(httpcore2.default_ssl_context)  # reads a file of certificates
        async with (
            httpcore2.AsyncConnectionPool(self._tls, network_backend=CheckedBackend(self._allowed)) as pool,
            pool.stream("GET", _plain(url), headers=headers) as response,
        ):
            found = {name.lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in found:
                return found[b"location"]
            if response.status != 200:
                raise ImageError(f"{shown!r} answered with status {response.status}; expected 200 and a picture.")
            announced = found.get(b"content-length", "")
            if announced.isdecimal() and (len(announced) > 18 or int(announced) > max_bytes):
                raise _too_large(shown, max_bytes)
            body = bytearray()
            async for chunk in response.aiter_stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(shown, max_bytes)
            return bytes(body)


def _too_large(shown: str, max_bytes: int) -> ImageError:
    return ImageError(f"{shown!r} has more than {max_bytes} bytes, which is the limit; scale it down.")


def _plain(url: httpx2.URL) -> httpcore2.URL:
    return httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)


def _joined(url: httpx2.URL, location: str, shown: str) -> str:
    try:
        return str(url.join(location))
    except (httpx2.InvalidURL, ValueError):
        raise ImageError(
            f"{shown!r} redirects to something that is not an address; give the picture's own address."
        ) from None


class CheckedBackend(httpcore2.AsyncNetworkBackend):
    """Connects only to addresses of the public internet, and to exactly the address that was checked."""

    def __init__(self, allowed: Sequence[Allowed] = ()) -> None:
        self._connect, self._allowed = httpcore2.AnyIOBackend(), allowed

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Resolve, check, connect. TLS above this still asks for a certificate of the name."""
        error: Exception | None = None
        for address in await public_addresses(host, port, self._allowed):
            try:
                return await self._connect.connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as failed:
                error = failed
        assert error is not None
        raise error


async def public_addresses(host: str, port: int, allowed: Sequence[Allowed] = ()) -> Sequence[Address]:
    """All addresses of a host, written in any form that the system understands (decimal, octal, a name).

    Parameters
    ----------
    allowed : addresses that the owner allows although they are not public.

    Raises
    ------
    NotAllowed
        When one of them is neither public nor named by the owner.
    ImageError
        When the host cannot be resolved.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ImageError(f"The host {host[:_SHOWN]!r} is not known; check the address of the picture.") from None
    addresses = list(dict.fromkeys(ip_address(entry[4][0]) for entry in found))
    may_be_reached = [is_public(found) or any(each.names(found, port) for each in allowed) for found in addresses]
    if not addresses or not all(may_be_reached):
        raise NotAllowed(
            f"The host {host[:_SHOWN]!r} is not on the public internet; pictures are fetched only from there."
        )
    return addresses
