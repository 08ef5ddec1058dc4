"""What one client may hold while there are others: connections, requests, and time for what is slow."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from edge_runtime.errors import EngineBusy
from edge_runtime.server.middleware.connections import GuardedConnection
from edge_runtime.server.middleware.pace import Pace
from edge_runtime.server.middleware.shares import Places, client_of
from edge_runtime.server.settings import Settings
from server.attacking import Serve, chat, connected, head, is_idle, post, rest_of, wait_until
from server.conftest import Served

ELSEWHERE = "127.0.0.2"
HEALTH = head("/health", "Connection: close", method="GET")


@contextlib.contextmanager
def from_elsewhere(served: Served, sent: bytes = b"") -> Iterator[socket.socket]:
    """A connection of another client."""
    address = (served.server.settings.host, int(served.url.rpartition(":")[2]))
    with socket.create_connection(address, 30, source_address=(ELSEWHERE, 0)) as found:
        found.sendall(sent)
        yield found


def answer(connection: socket.socket) -> bytes:
    """What comes until the end, waiting for it."""
    connection.settimeout(30)
    return rest_of(connection)


# --- who it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("2606:2800:21f::1", "2606:2800:21f::ffff:1", True),
        ("2606:2800:21f::1", "2606:2800:21f:1::1", False),
        ("::1", "::2", False),
        ("", "", True),
        ("a socket's name", "another", False),
    ],
)
def test_clients(one, other, same):
    assert (client_of(one) == client_of(other)) is same


def test_places():
    places = Places(4, 3, "things are made")
    leave = [places.take("a") for _ in range(3)]
    with pytest.raises(EngineBusy, match="3 things are made from your address, which is its share"):
        places.take("a")
    leave.append(places.take("b"))
    with pytest.raises(EngineBusy, match="4 things are made, which is the limit"):
        places.take("b")
    for each in leave:
        each()
    assert places.n == 0
    for _ in range(3):
        places.take("a")


@pytest.mark.parametrize(
    ("settings", "queue", "connections"),
    [
        ({}, 56, 384),
        ({"max_queue": 1, "max_connections": 1}, 1, 1),
        ({"max_queue": 8, "max_connections": 8}, 7, 6),
        ({"max_queue_per_client": 2, "max_connections_per_client": 3}, 2, 3),
        ({"max_queue_per_client": 1000, "max_connections_per_client": 1000}, 64, 512),
    ],
)
def test_the_share_of_one(settings, queue, connections):
    found = Settings(**settings).checked()
    assert (found.queue_of_one, found.connections_of_one) == (queue, connections)


# --- connections ---------------------------------------------------------------------------------------------------


@pytest.fixture
def many_files() -> Iterator[None]:
    """Both ends of every connection are in this process, and the limit is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_idle_connections_make_room_for_those_that_ask(serve: Serve, many_files):
    """520 of one address: others are answered, that address as well, and the oldest ones go."""
    served = serve()
    address = (served.server.settings.host, int(served.url.rpartition(":")[2]))
    with contextlib.ExitStack() as stack:
        idle = []
        for i in range(520):
            idle.append(stack.enter_context(socket.create_connection(address, 30)))
            if i % 3 == 1:
                idle[-1].sendall(b"GET /health HTTP/1.1\r\nHost: 127")
            if i % 3 == 2:  # asked once, and quiet since
                idle[-1].sendall(head("/health", method="GET"))
                assert b"200 OK" in idle[-1].recv(1000)
        with from_elsewhere(served, HEALTH) as other:
            assert b"200 OK" in answer(other)
        for _ in range(3):
            with connected(served, HEALTH) as same:
                assert b"200 OK" in answer(same)
        assert httpx.get(served.url + "/health", trust_env=False).status_code == 200
        assert len(served.server.server_state.connections) <= 386
        idle[0].settimeout(10)
        assert idle[0].recv(10) == b""  # closed, not reset
        idle[-1].sendall(HEALTH)
        assert b"200 OK" in answer(idle[-1])


def test_connections_at_work_are_not_given_up(serve: Serve):
    """They have a share, and who comes beyond it hears so in its API's words."""
    served = serve(max_connections=5, max_connections_per_client=3)
    body = json.dumps(chat()).encode()
    with contextlib.ExitStack() as stack:
        asking = head("/api/show", f"Content-Length: {len(body)}") + body[:5]
        busy = [stack.enter_context(connected(served, asking)) for _ in range(3)]
        wait_until(lambda: sum(not each.is_idle for each in served.server.server_state.connections) == 3)
        for path, shape in (
            ("/api/show", ("error",)),
            ("/v1/chat/completions", ("error", "message")),
            ("/v1/messages", ("error", "message")),
            ("/tokenize", ("error", "message")),
        ):
            reply = post(served, path, chat())
            assert reply.status_code == 503
            assert int(reply.headers["retry-after"]) > 0
            assert reply.headers["connection"] == "close"
            text: Any = reply.json()
            for key in shape:
                text = text[key]
            assert "3 busy connections" in text
        quiet = [stack.enter_context(from_elsewhere(served)) for _ in range(2)]
        wait_until(lambda: len(served.server.server_state.connections) == 5)
        with from_elsewhere(served, HEALTH) as other:  # takes the place of the older quiet one
            assert b"200 OK" in answer(other)
        quiet[0].settimeout(10)
        assert quiet[0].recv(10) == b""
        for each in busy:
            each.sendall(body[5:])
            each.settimeout(60)
            assert b"200 OK" in each.recv(1000)
    wait_until(lambda: not served.server.server_state.connections)


def test_those_that_are_turned_away_are_bounded_too(serve: Serve, monkeypatch):
    monkeypatch.setattr("edge_runtime.server.middleware.connections.MAX_SURPLUS", 2)
    monkeypatch.setattr("edge_runtime.server.middleware.connections.SURPLUS_S", 0.3)
    served = serve(max_connections=1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(connected(served, head("/api/show", "Content-Length: 10")))
        wait_until(lambda: any(not each.is_idle for each in served.server.server_state.connections))
        for _ in range(5):
            stack.enter_context(connected(served))
        wait_until(lambda: len(served.server.server_state.connections) <= 3)
        wait_until(lambda: len(served.server.server_state.connections) == 1, 5)
    assert httpx.get(served.url + "/health", trust_env=False).status_code == 200


# --- requests ------------------------------------------------------------------------------------------------------


def test_one_client_does_not_fill_the_queue(serve: Serve, endless):
    served = serve(max_queue=3, max_queue_per_client=2)
    body = json.dumps(chat(options={"num_predict": 3})).encode()
    forever = json.dumps(chat(stream=True)).encode()
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            asking = head("/api/chat", f"Content-Length: {len(forever)}") + forever
            stack.enter_context(connected(served, asking)).recv(10)
        refused = post(served, "/v1/chat/completions", chat())
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert "your address" in refused.json()["error"]["message"]
        asking = head("/api/chat", f"Content-Length: {len(body)}", "Connection: close") + body
        with from_elsewhere(served, asking) as other:
            other.settimeout(60)
            assert b"200 OK" in rest_of(other)
    wait_until(lambda: is_idle(served))
    assert post(served, "/api/chat", chat(options={"num_predict": 3})).status_code == 200


def test_cutting_text_takes_a_place_in_the_queue(serve: Serve):
    served = serve(max_queue=1)
    with served.state.inference.admitted():
        for path, body in (("/tokenize", {"content": "a"}), ("/detokenize", {"tokens": [40]})):
            reply = post(served, path, body)
            assert reply.status_code == 429
            assert "1 requests are waiting or running" in reply.json()["error"]["message"]
    assert post(served, "/tokenize", {"content": "a"}).status_code == 200
    assert is_idle(served)


# --- time ----------------------------------------------------------------------------------------------------------


def test_pace():
    """A burst buys no more than the patience one begins with."""
    pace = Pace(10.0, 100.0)
    assert pace.waited(9.0, 100)
    assert pace.left_s == 2.0
    assert pace.waited(1.0, 1_000_000)
    assert pace.left_s == 10.0
    assert all(pace.waited(1.0, 100) for _ in range(1000))
    assert [pace.waited(1.0, 50) for _ in range(19)] == [True] * 18 + [False]
    assert not pace.waited(0.0, 1_000_000)


def test_a_body_that_begins_fast_and_drips_on(serve: Serve):
    served = serve(body_timeout_s=0.5)
    with connected(served, head("/api/show", "Content-Length: 5000000") + bytes(2_000_000)) as connection:
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 5:
                connection.sendall(b" ")
                time.sleep(0.02)
                connection.settimeout(0.001)
                with contextlib.suppress(TimeoutError):
                    assert b"408 " in connection.recv(1000)
                    break
        assert time.monotonic() - started < 4


@pytest.mark.parametrize(("least", "is_kept"), [(4096, True), (4_000_000, False)])
def test_readers_have_a_pace(serve: Serve, monkeypatch, least, is_kept):
    """A whole reply of a megabyte, read with some hundred kilobytes a second."""
    begin = GuardedConnection.connection_made

    def begin_small(self: GuardedConnection, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        begin(self, transport)

    monkeypatch.setattr(GuardedConnection, "connection_made", begin_small)
    served = serve(body_timeout_s=0.4, min_bytes_per_s=least)
    body = json.dumps({"content": "a b c d " * 40_000}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        connection.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
        connection.settimeout(60)
        sending = threading.Thread(
            target=connection.sendall, args=(head("/tokenize", f"Content-Length: {len(body)}") + body,)
        )
        sending.start()
        n_read, started = 0, time.monotonic()
        while time.monotonic() - started < 2.0 or not n_read:
            try:
                data = connection.recv(4096)
            except ConnectionError:
                break
            n_read += len(data)
            if not data:
                break
            if n_read == len(data):
                started = time.monotonic()
            time.sleep(0.01)
        sending.join()
        assert (time.monotonic() - started >= 2.0) is is_kept
    wait_until(lambda: not served.server.server_state.connections)


def test_replies_are_sent_at_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every packet but the first waits until the client's system acknowledges the one before."""
    options, begin = [], GuardedConnection.connection_made

    def note_option(self: GuardedConnection, transport: Any) -> None:
        begin(self, transport)
        accepted = transport.get_extra_info("socket")
        options.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(GuardedConnection, "connection_made", note_option)
    with connected(serve(), HEALTH) as connection:
        assert b" 200 " in rest_of(connection)
    assert options
    assert all(options)
