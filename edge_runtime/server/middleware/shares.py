"""Which client a request comes from, and how much of the server one client may hold.

A client is an address: nothing else is known before a request is read. The addresses of one IPv6 network (/64) are
one client, since each of its machines may use any of them. When all clients come through a proxy, or from this
machine, they share one address: the limits per client are a large part of those for all, so a single address can
still use most of the server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from starlette.types import ASGIApp, Receive, Scope, Send

from edge_runtime.errors import EngineBusy
from edge_runtime.server.errors import TooManyConnections
from edge_runtime.server.middleware.gate import refuse

SURPLUS = "edge_runtime.surplus"
"""Key of a connection's state: why its request is not answered. See `connections`."""
BACKGROUND = "edge_runtime.background"
"""Key of a scope's extensions, which only this process can set: a request that gives way to all others."""
_ASKING: ContextVar[str] = ContextVar("edge_runtime_client", default="")


@dataclass(frozen=True)
class Background:
    """A request that this process makes itself, for a client who does not wait for it."""

    owner: str = ""
    """Whose stored responses it may see, see `responses_store.owner_of`."""


_BACKGROUND: ContextVar[Background | None] = ContextVar("edge_runtime_background", default=None)


def client_of(address: str) -> str:
    """The client behind an address; empty if there is none (a Unix socket, a test)."""
    try:
        found: IPv4Address | IPv6Address = ip_address(address)
    except ValueError:
        return address
    if isinstance(found, IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        if not found.is_loopback:
            return str(IPv6Network((int(found), 64), strict=False))
    return str(found)


def asking() -> str:
    """The client whose request is running in this context."""
    return _ASKING.get()


def in_background() -> Background | None:
    """What is known of the request that is running in this context if it gives way to all others; None if not."""
    return _BACKGROUND.get()


def background_of(scope: Scope) -> Background | None:
    """As `in_background`, of any request."""
    found: Background | None = scope.get("extensions", {}).get(BACKGROUND)
    return found


class Clients:
    """Records whose request it is, and refuses requests on connections beyond the limit."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        surplus = scope.get("state", {}).get(SURPLUS)
        if surplus is not None:
            await refuse(TooManyConnections(surplus), scope, receive, send)
            return
        before = _ASKING.set(client_of((scope.get("client") or ("",))[0]))
        background = _BACKGROUND.set(background_of(scope))
        try:
            await self._app(scope, receive, send)
        finally:
            _BACKGROUND.reset(background)
            _ASKING.reset(before)


@dataclass
class Places:
    """A limited number of places.

    Parameters
    ----------
    max_total, max_each : limits for all clients together, and for one.
    what : what is counted, in the plural, for errors.
    """

    max_total: int
    max_each: int
    what: str
    n: int = 0
    _held: Counter[str] = field(default_factory=Counter)

    def take(self, client: str) -> Callable[[], None]:
        """Take a place; returns the function that gives it back.

        Raises
        ------
        EngineBusy
            When there is none.
        """
        if self.n >= self.max_total:
            raise EngineBusy(f"{self.n} {self.what}, which is the limit; try again later.")
        if self._held[client] >= self.max_each:
            raise EngineBusy(
                f"{self._held[client]} {self.what} from your address, which is its share; try again later."
            )
        self.n += 1
        self._held[client] += 1

        def leave() -> None:
            self.n -= 1
            self._held[client] -= 1
            if not self._held[client]:
                del self._held[client]

        return leave
