"""What attackers have: connections they write into by hand, requests, and how to see that nothing of them is left."""

from __future__ import annotations

import base64
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from server.conftest import SIGN, Served

QUESTION = {"role": "user", "content": "What does it say?", "images": [base64.b64encode(SIGN.read_bytes()).decode()]}


Serve = Callable[..., Served]


def chat(**fields: Any) -> dict[str, Any]:
    """Body of a question to Ollama's API."""
    return {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "stream": False, **fields}


def post(served: Served, path: str, body: Any, **headers: str) -> httpx.Response:
    """One request with a connection of its own."""
    return httpx.post(served.url + path, json=body, headers=headers, timeout=60, trust_env=False)


def wait_until(what: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def is_idle(served: Served) -> bool:
    """Whether nothing of any request is left."""
    loaded = [slot.model.activity for slot in served.state.registry.loaded() if slot.model is not None]
    return served.state.inference.n_open == 0 and not any(found.waiting or found.running for found in loaded)


@contextlib.contextmanager
def connected(served: Served, sent: bytes = b"") -> Iterator[socket.socket]:
    """A bare connection."""
    with socket.create_connection((served.server.settings.host, int(served.url.rpartition(":")[2])), 10) as found:
        found.sendall(sent)
        yield found


def rest_of(connection: socket.socket) -> bytes:
    """Everything until the other side closes, however it does that."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(1 << 16):
            found += data
    return found


def takes_connections(served: Served) -> bool:
    """Whether new clients are let in."""
    try:
        with connected(served):
            return True
    except ConnectionError:
        return False


def is_open(connection: socket.socket, sent: bytes) -> bool:
    """Whether a connection still takes something; waits a moment for what comes back."""
    connection.settimeout(0.05)
    try:
        connection.sendall(sent)
        return connection.recv(100) != b""
    except TimeoutError:
        return True
    except ConnectionError:
        return False


def head(path: str, *lines: str, method: str = "POST", host: str = "127.0.0.1") -> bytes:
    """Beginning of a request."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode()
