"""Downloads that a client asked for: each hop is allowed, or nothing is sent there, not even a head."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import httpx2
import pytest

from edge_runtime.errors import AddressRefused, StoreFull
from edge_runtime.store.library import Library
from edge_runtime.store.pull import pull
from edge_runtime.system import addresses
from edge_runtime.system.addresses import Allowed, FetchPolicy, checked, enforced
from edge_runtime.system.plain_files import is_plain, open_plain
from store.conftest import DECODER
from support.hub_server import Fault

PAIR = "hf:org/pair"


class Inside:
    """A service of this machine that nobody outside may talk to."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.heard: list[bytes] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                try:
                    self.heard.append(connection.recv(4096))
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nsecret")
                except OSError:
                    self.heard.append(b"")


@pytest.fixture
def inside() -> Iterator[Inside]:
    service = Inside()
    yield service
    service.listener.close()


def allow(*texts: str) -> list[Allowed]:
    return [Allowed.parse(text) for text in texts]


def leads_to(hub: Any, location: str) -> None:
    """The next request for a file's bytes is sent elsewhere."""
    hub.faults.append(Fault(status=302, headers={"Location": location}))


def test_a_hub_may_send_on_to_itself(hub, store):
    """127.0.0.1 sends to localhost, as a hub does to its storage; the key stays with the hub."""
    assert pull(PAIR, allowed=()).complete


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:INSIDE/model.gguf",
        "http://localhost:INSIDE/model.gguf",
        "http://[::ffff:127.0.0.1]:INSIDE/",
        "http://2130706433:INSIDE/",
        "http://0:INSIDE/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://inside.example/",
        "http://inside.example:HUB/",
        "https://10.0.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "https://169.254.169.254/latest/meta-data/",
        "http://user:word@127.0.0.1:HUB/",
        "https://example.org:8443/",
        "https://example.org:22/",
    ],
)
def test_redirects_that_lead_inside(hub, store, inside, monkeypatch, location):
    known = socket.getaddrinfo

    def resolve(host: str, port: int, *more: Any, **named: Any) -> Any:
        if host == "inside.example":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.1.2.3", port))]
        assert host not in ("example.org", b"example.org"), "no name server is asked by a test"
        return known(host, port, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    leads_to(hub, location.replace("INSIDE", str(inside.port)).replace("HUB", str(hub.port)))
    with pytest.raises(AddressRefused, match="The download leads to"):
        pull(PAIR, allowed=())
    assert inside.heard == []
    assert not [entry for entry in Library().entries() if entry.complete]


def test_what_a_redirect_of_a_redirect_leads_to(hub, store, inside):
    for _ in range(2):
        leads_to(hub, f"http://localhost:{hub.port}/cdn/org/pair/{DECODER}")
    leads_to(hub, f"http://127.0.0.1:{inside.port}/")
    with pytest.raises(AddressRefused):
        pull(PAIR, allowed=())
    assert inside.heard == []


def test_a_name_that_leads_elsewhere_when_it_is_connected_to(hub, store, inside, monkeypatch):
    """DNS rebinding: the machine is looked at behind the connection, before a byte is sent."""
    known, asked = socket.getaddrinfo, []

    def resolve(host: str, port: int, *more: Any, **named: Any) -> Any:
        if host != "rebind.example":
            return known(host, port, *more, **named)
        asked.append(host)
        address = "93.184.215.14" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    leads_to(hub, f"http://rebind.example:{inside.port}/model.gguf")
    with pytest.raises(AddressRefused, match="not on the public internet"):
        pull(PAIR, allowed=allow(f"rebind.example:{inside.port}"))
    assert len(asked) == 2
    assert inside.heard in ([], [b""])


def test_what_the_owner_named_by_its_number(hub, store, inside):
    leads_to(hub, f"http://127.0.0.1:{inside.port}/model.gguf")
    assert pull(PAIR, allowed=allow(f"127.0.0.1:{inside.port}")).complete  # asked again: what came was something else
    assert inside.heard[0].startswith(b"GET /model.gguf")


def test_addresses_of_clients_have_to_be_allowed(hub, store):
    address = f"{hub.url}/cdn/org/pair/{DECODER}"
    for allowed in ((), allow("127.0.0.1"), allow("*"), allow("localhost:1"), allow(f"*:{hub.port}")):
        hub.requests.clear()
        with pytest.raises(AddressRefused):
            pull(address, allowed=allowed)
        assert hub.requests == []
    assert pull(address, allowed=allow(f"127.0.0.1:{hub.port}")).complete


def test_how_much_clients_may_fetch(hub, store):
    with pytest.raises(StoreFull, match="--max-store"):
        pull(PAIR, allowed=(), max_bytes=1000)
    assert hub.bytes_requests() == []
    assert pull(PAIR, allowed=(), max_bytes=1 << 30).complete


def test_a_proxy_of_the_owner_may_be_anywhere(inside, monkeypatch):
    policy = FetchPolicy(endpoint="https://huggingface.co")
    inner = ip_address("127.0.0.1")
    with pytest.raises(AddressRefused):
        policy.check_peer("proxy.example", inner, inside.port)
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{inside.port}")
    policy.check_peer("127.0.0.1", inner, inside.port)
    with pytest.raises(AddressRefused):
        policy.check_peer("127.0.0.1", inner, inside.port + 1)


def test_clients_are_checked_in_their_context_alone(inside):
    with httpx2.Client(trust_env=False) as client:
        checked(client)
        assert client.event_hooks["request"] == []
        with enforced(FetchPolicy()):
            checked(checked(client))
        assert len(client.event_hooks["request"]) == 1
        address = f"http://127.0.0.1:{inside.port}/"
        assert client.get(address).text == "secret"
        with enforced(FetchPolicy()), pytest.raises(AddressRefused):
            client.get(address)
        with enforced(FetchPolicy((Allowed.parse(f"127.0.0.1:{inside.port}"),))):
            assert client.get(address).text == "secret"
    assert addresses._POLICY.get() is None


def test_plain_files(tmp_path):
    file, link, pipe = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    file.write_bytes(b"x")
    link.symlink_to(file)
    os.mkfifo(pipe)
    with open_plain(file) as opened:
        assert opened.read() == b"x"
    for other in (link, pipe, tmp_path, tmp_path / "none"):
        assert not is_plain(other)
        with pytest.raises(OSError):
            open_plain(other)
