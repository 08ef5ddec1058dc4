"""The address of a server, and the key for it.

The key comes from the environment or from the caller, never from an address or a command line, and is shown nowhere.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from ipaddress import ip_address

import httpx2

from edge_runtime.errors import MessageError

KEY_VARIABLE = "EDGE_RUNTIME_ENDPOINT_KEY"
OPENAI_KEY_VARIABLE, OPENAI_HOST = "OPENAI_API_KEY", "api.openai.com"
"""OpenAI's own variable is sent to OpenAI alone: another server would get to know a key that is none of its
business."""
_VERSION = re.compile(r"v[0-9]+[a-z0-9]*")
_ROUTES = ("/chat/completions", "/completions", "/models")
EXPECTED = "expected http:// or https:// with a host, such as http://127.0.0.1:8000/v1"


@dataclass(frozen=True)
class Address:
    """Where a server is."""

    base: httpx2.URL
    """With the version of the API, without a slash at its end: `http://127.0.0.1:8000/v1`."""
    key: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return str(self.base)

    @property
    def root(self) -> str:
        """The address without the version: where servers have routes besides OpenAI's."""
        segments = self.base.path.split("/")
        first = next(i for i, segment in enumerate(segments) if _VERSION.fullmatch(segment))
        return str(self.base.copy_with(path="/".join(segments[:first]) or "/")).rstrip("/")

    @property
    def host(self) -> str:
        """The host, and its port if that is not the usual one, for people."""
        return self.base.netloc.decode("ascii")

    @property
    def is_loopback(self) -> bool:
        """Whether the server is on this machine."""
        name = self.base.host
        try:
            return ip_address(name).is_loopback
        except ValueError:
            return name == "localhost" or name.endswith(".localhost")

    def warnings(self) -> list[str]:
        """What a user should know before the key is sent."""
        if self.key is None or self.base.scheme == "https" or self.is_loopback:
            return []
        return [f"The key for {self.host} is sent without encryption; use https:// if the server has it."]


def parse_address(text: str, key: str | None = None) -> Address:
    """Read an address as people write it: with or without the scheme, `/v1` and a route.

    Parameters
    ----------
    key : sent as a bearer token; None takes `EDGE_RUNTIME_ENDPOINT_KEY`, or for OpenAI's own server `OPENAI_API_KEY`.

    Raises
    ------
    MessageError
        When it is no address, or holds a password, a query or a fragment; or when the key cannot be sent.
    """
    written = text.strip()
    if "://" not in written:
        written = f"http://{written}"
    try:
        url = httpx2.URL(written)
        port_is_valid = url.port is None or 0 < url.port < 65536
    except (httpx2.InvalidURL, ValueError, TypeError):
        raise MessageError(f"The endpoint {_shown(text)} is no address; {EXPECTED}.") from None
    if url.userinfo or "@" in written.split("://", 1)[1].split("/", 1)[0]:
        raise MessageError(
            f"The endpoint holds a user or a password, which would be seen in lists of processes; put a key into "
            f"{KEY_VARIABLE} instead."
        )
    is_odd = not url.host or not port_is_valid or any(map(str.isspace, written))
    if url.scheme not in ("http", "https") or is_odd:
        raise MessageError(f"The endpoint is {_shown(text)}; {EXPECTED}.")
    if url.query or url.fragment:
        raise MessageError(
            f"The endpoint {_shown(written.partition('?')[0].partition('#')[0])} goes on after its path, where "
            f"some servers "
            f"expect a key; "
            f"leave that out, and put a key into {KEY_VARIABLE}."
        )
    path = url.path.rstrip("/")
    for route in _ROUTES:
        path = path.removesuffix(route)
    if not any(_VERSION.fullmatch(segment) for segment in path.split("/")):
        path = f"{path}/v1"
    return Address(url.copy_with(path=path), _key(url.host, key))


def _shown(text: str) -> str:
    """An address for an error, without what may be a password before an @."""
    return repr(text.rpartition("@")[2][:80])


def _key(host: str, given: str | None) -> str | None:
    key = given if given is not None else os.environ.get(KEY_VARIABLE)
    if key is None and host == OPENAI_HOST:
        key = os.environ.get(OPENAI_KEY_VARIABLE)
    key = (key or "").strip()
    if not all(33 <= ord(character) <= 126 for character in key):
        raise MessageError("The endpoint's key has blanks or characters beyond ASCII; expected the key alone.")
    return key or None
