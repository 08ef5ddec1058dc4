"""Which addresses may be fetched when somebody else supplies them: a client's picture or model, a hub's redirect.

Such an address could make this machine talk to its own services, to the router, or to a cloud's metadata (SSRF). So
every hop must be to an allowed host and port, and the connection must go to the public internet or to an address that
the owner named. The latter is checked when the connection is made, as a name may resolve differently each time.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx2

from edge_runtime.errors import AddressRefused, MessageError

PORTS = {"http": 80, "https": 443}
_NAT64 = IPv6Network("64:ff9b::/96")
Address = IPv4Address | IPv6Address


def is_public(address: Address) -> bool:
    """Whether an address belongs to a machine on the public internet.

    Not public: this machine, private and link-local networks, carrier-grade NAT, multicast, reserved addresses, and
    IPv6 addresses that carry such an IPv4 address (mapped, 6to4, NAT64).
    """
    if isinstance(address, IPv6Address):
        inside = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inside = IPv4Address(int(address) & 0xFFFFFFFF)
        if inside is not None:
            return is_public(inside)
        if address.scope_id is not None or address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


@dataclass(frozen=True)
class Allowed:
    """One `--allow-url`: HOST, *.DOMAIN or *, each with :PORT if it is not the scheme's default.

    Where HOST is an IP address, connections to that address are allowed, public or not.
    """

    host: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> Allowed:
        """Parse what the owner wrote.

        Raises
        ------
        MessageError
            When it has a path, or is not a host.
        """
        host, colon, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
        if not colon:
            host = text
        wildcard = host[:2] if host.startswith("*.") else "*" if host == "*" else ""
        try:
            name = host_of(httpx2.URL(f"http://{host[len(wildcard) :]}"))
        except (httpx2.InvalidURL, ValueError):
            name = ""
        if not (name or wildcard == "*") or "/" in host or (colon and not (port.isascii() and port.isdigit())):
            raise MessageError(f"--allow-url is {text!r}; expected a host such as example.org or *.example.org:8443.")
        return cls(wildcard + name, int(port) if colon else None)

    def covers(self, url: httpx2.URL) -> bool:
        """Whether a URL has this host and port."""
        if (url.port or PORTS[url.scheme]) != (self.port or PORTS[url.scheme]):
            return False
        host = host_of(url)
        if self.host == "*":
            return True
        return host.endswith(self.host[1:]) if self.host.startswith("*.") else host == self.host

    def names(self, address: Address, port: int) -> bool:
        """Whether the owner wrote this IP address, with this port."""
        try:
            return ip_address(self.host) == address and port in ((self.port,) if self.port else PORTS.values())
        except ValueError:
            return False


def host_of(url: httpx2.URL) -> str:
    """The host of a URL in its canonical spelling; IPv6 without brackets."""
    return url.raw_host.decode("ascii").lower().rstrip(".")


@dataclass(frozen=True)
class FetchPolicy:
    """What a download on a client's behalf may reach.

    Parameters
    ----------
    allowed : by the owner.
    endpoint : address of the hub, which the owner chose, wherever it is; it may redirect to any public host at the
        standard port, and to its own machine. Empty: only what is allowed.
    """

    allowed: tuple[Allowed, ...] = ()
    endpoint: str = ""

    def check(self, address: str) -> None:
        """Check the address of one hop, before anything is resolved.

        Raises
        ------
        AddressRefused
        """
        try:
            url = httpx2.URL(address)
            is_address = url.scheme in PORTS and bool(url.host) and not url.userinfo
        except (httpx2.InvalidURL, ValueError, TypeError):
            is_address = False
        if not is_address:
            raise AddressRefused("The download leads to something that is not a web address; nothing was fetched.")
        if any(allowed.covers(url) for allowed in self.allowed):
            return
        if self.endpoint:
            hub = httpx2.URL(self.endpoint)
            port, of_hub = url.port or PORTS[url.scheme], hub.port or PORTS[hub.scheme]
            if port == of_hub or port == PORTS["https"] == PORTS[url.scheme]:
                return
        raise AddressRefused(
            f"The download leads to {host_of(url)[:80]!r}, port {url.port or PORTS[url.scheme]}, from which this "
            "server may not fetch; its owner can allow it with --allow-url HOST:PORT."
        )

    def check_peer(self, host: str, address: Address, port: int) -> None:
        """Check the machine that a connection leads to.

        Raises
        ------
        AddressRefused
        """
        if is_public(address) or any(each.names(address, port) for each in self.allowed):
            return
        if self._is_endpoint(address, port) or _is_proxy(host, port):
            return
        raise AddressRefused(
            f"The download leads to {host[:80]!r}, port {port}, which is not on the public internet; the server's "
            "owner can allow it by its number with --allow-url ADDRESS:PORT."
        )

    def _is_endpoint(self, address: Address, port: int) -> bool:
        if not self.endpoint:
            return False
        hub = httpx2.URL(self.endpoint)
        if port != (hub.port or PORTS[hub.scheme]):
            return False
        found = _resolved(host_of(hub), port)
        return address in found or (address.is_loopback and any(each.is_loopback for each in found))

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Check each connection before a byte goes through it: httpcore's extension of this name."""
        if event == "connection.connect_tcp.started":
            for address in _resolved(info["host"], info["port"]):
                self.check_peer(str(info["host"]), address, info["port"])
        elif event == "connection.connect_tcp.complete":
            stream = info["return_value"]
            address, port = stream.get_extra_info("server_addr")[:2]
            try:
                self.check_peer(address, ip_address(address), port)
            except AddressRefused:
                stream.close()
                raise


def _resolved(host: str, port: int) -> list[Address]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []  # connecting will report it
    return list(dict.fromkeys(ip_address(entry[4][0]) for entry in found))


def _is_proxy(host: str, port: int) -> bool:
    """Whether the owner's environment names this as a proxy, which then decides what may be reached."""
    for address in getproxies().values():
        with contextlib.suppress(ValueError):
            parts = urlsplit(address if "://" in address else f"http://{address}")
            usual = PORTS.get(parts.scheme, 1080)
            is_same = host == parts.hostname or host in map(str, _resolved(parts.hostname or "", port))
            if is_same and port == (parts.port or usual):
                return True
    return False


_POLICY: ContextVar[FetchPolicy | None] = ContextVar("edge_runtime_fetch_policy", default=None)


@contextlib.contextmanager
def enforced(policy: FetchPolicy | None) -> Iterator[None]:
    """Apply a policy to all requests of `checked` clients in this context; None allows everything."""
    before = _POLICY.set(policy)
    try:
        yield
    finally:
        _POLICY.reset(before)


def checked(client: httpx2.Client) -> httpx2.Client:
    """Return a client whose requests, redirects included, are checked by the policy of their context, if any."""
    hooks = client.event_hooks if _POLICY.get() is not None else None
    if hooks is not None and _check not in hooks["request"]:
        client.event_hooks = {**hooks, "request": [*hooks["request"], _check]}
    return client


def _check(request: httpx2.Request) -> None:
    policy = _POLICY.get()
    if policy is not None:
        policy.check(str(request.url))
        request.extensions = {**request.extensions, "trace": policy.trace}
