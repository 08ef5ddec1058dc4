"""Clients that are slow or vanish, and a server that is told to end: everything is freed, in time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from typing import Any

import httpx
import pytest

from edge_runtime.inputs.workers.pool import Lease
from edge_runtime.server import replies
from edge_runtime.server.inference import MAX_DECODERS, TEXT_THREADS
from edge_runtime.server.middleware.connections import GuardedConnection
from edge_runtime.server.settings import Settings
from server.attacking import (
    QUESTION,
    Serve,
    chat,
    connected,
    head,
    is_idle,
    is_open,
    post,
    rest_of,
    takes_connections,
    wait_until,
)

# --- slow and vanishing clients ------------------------------------------------------------------------------------

POOLS = ("AnyIO worker thread", "asyncio_", "edge-runtime pictures", "edge-runtime texts", "edge-runtime decoding")
OURS = TEXT_THREADS + Settings().max_queue + 2 * MAX_DECODERS
MAX_POOLED = 40 + min(32, (os.cpu_count() or 1) + 4) + OURS  # AnyIO's limit, the event loop's, and ours


@pytest.mark.parametrize("sent", [b"", b"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1\r\nX-a: "])
def test_a_head_that_never_ends(serve: Serve, sent):
    """Silence, and a byte now and then: both are over when the time for a head is."""
    served = serve(header_timeout_s=0.4)
    with connected(served, sent) as connection:
        started = time.monotonic()
        wait_until(lambda: not is_open(connection, b"a" if sent else b""))
        assert 0.3 < time.monotonic() - started < 3


def test_the_second_head_has_to_end_too(serve: Serve):
    served = serve(header_timeout_s=0.4)
    with connected(served, head("/health", method="GET")) as connection:
        assert b"200 OK" in connection.recv(1000)
        connection.sendall(b"GET /health HT")
        started = time.monotonic()
        rest_of(connection)
        assert 0.3 < time.monotonic() - started < 3


def test_a_body_that_never_ends(serve: Serve):
    served = serve(body_timeout_s=0.3)
    with connected(served, head("/api/chat", "Content-Length: 1000") + b"{") as connection:
        started = time.monotonic()
        assert b"408 " in rest_of(connection)
        assert time.monotonic() - started < 5
    wait_until(lambda: is_idle(served))


def test_a_reader_who_does_not_read(serve: Serve, endless, monkeypatch):
    """What is ready for him is bounded, and so is the time it is kept."""
    begin = GuardedConnection.connection_made

    def begin_small(self: GuardedConnection, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
        )  # or it takes megabytes
        begin(self, transport)

    monkeypatch.setattr(GuardedConnection, "connection_made", begin_small)
    served = serve(body_timeout_s=1.0, max_tokens=100_000)
    post(served, "/api/chat", chat(options={"num_predict": 1}))
    body = json.dumps(chat(stream=True, options={"num_predict": 100_000})).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
        connection.sendall(head("/api/chat", f"Content-Length: {len(body)}") + body)
        wait_until(lambda: not is_idle(served))
        wait_until(lambda: is_idle(served), 60)
    assert post(served, "/api/chat", chat(options={"num_predict": 3})).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_vanish(serve: Serve, endless, stream):
    served = serve()
    post(served, "/api/chat", chat(options={"num_predict": 1}))
    body = json.dumps(chat(stream=stream, messages=[QUESTION], options={"num_predict": 100_000})).encode()
    alone = []
    for _ in range(4):
        for _ in range(16):
            with connected(served, head("/api/chat", f"Content-Length: {len(body)}") + body) as connection:
                if stream:
                    connection.recv(100)
                wait_until(lambda: not is_idle(served))
        wait_until(lambda: is_idle(served))
        names = sorted(thread.name for thread in threading.enumerate())
        alone.append([name for name in names if not name.startswith(POOLS)])
    # Threads of pools come one by one until there are enough: only a bound holds for them, less than the 64 requests.
    assert len(names) <= MAX_POOLED + len(alone[-1])
    assert alone[-1] == alone[0]
    assert post(served, "/api/chat", chat(options={"num_predict": 3})).status_code == 200


def test_pictures_of_a_client_that_has_left_are_not_decoded(serve: Serve, monkeypatch):
    served, ask, seen = serve(), Lease.ask, []

    def slowly(lease: Lease, request: Any, *args: Any, **options: Any) -> Any:
        if request["op"] == "cut":
            seen.append(time.monotonic())
            time.sleep(0.1)
        return ask(lease, request, *args, **options)

    post(served, "/api/chat", chat(options={"num_predict": 1}))
    monkeypatch.setattr(Lease, "ask", slowly)
    question = {**QUESTION, "images": QUESTION["images"] * 12}
    for path, body in (
        ("/api/chat", chat(messages=[question])),
        ("/v1/messages/count_tokens", {"model": "demo", "messages": [anthropic_question(12)]}),
    ):
        seen.clear()
        data = json.dumps(body).encode()
        with connected(served, head(path, f"Content-Length: {len(data)}") + data):
            wait_until(lambda: len(seen) >= 2)
        wait_until(lambda: is_idle(served))
        time.sleep(0.5)
        n_seen = len(seen)
        time.sleep(1.0)
        assert len(seen) == n_seen < 12


def anthropic_question(n_pictures: int) -> dict[str, Any]:
    """A message with the picture of QUESTION so many times."""
    source = {"type": "base64", "media_type": "image/png", "data": QUESTION["images"][0]}
    return {"role": "user", "content": [{"type": "image", "source": source}] * n_pictures}


def test_an_answer_whose_client_leaves_as_it_begins_is_closed():
    """Leaving, or the time that is over, may come in the very step in which the answer is there."""

    async def leave() -> None:
        closed = []

        class Begun:
            async def close(self) -> None:
                closed.append(self)

        class Waiting:
            async def receive(self) -> dict[str, Any]:
                await asyncio.Event().wait()
                return {}

        class Beginning:
            async def begin(self, call: Any) -> Begun:
                await asyncio.sleep(0)
                asking.cancel()
                return Begun()

        asking = asyncio.create_task(replies.begin(Waiting(), Beginning(), None))  # type: ignore[arg-type]
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert len(closed) == 1

    asyncio.run(leave())


# --- the end -------------------------------------------------------------------------------------------------------


def test_running_answers_finish_and_new_ones_are_refused(serve: Serve, endless):
    served = serve(grace_s=600.0)
    asking = chat(stream=True, options={"num_predict": 300})
    with httpx.stream("POST", served.url + "/api/chat", json=asking, timeout=60, trust_env=False) as reply:
        lines = reply.iter_lines()
        next(lines)
        served.server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: not takes_connections(served))
        last = json.loads([*lines][-1])
    assert (last["done"], last["done_reason"]) == (True, "length")
    assert last.get("eval_count", 300) == 300


def test_after_the_grace_time_answers_are_ended_with_a_word(serve: Serve, endless):
    served = serve(grace_s=0.3, max_tokens=100_000)
    asking = chat(stream=True, options={"num_predict": 100_000})
    with httpx.stream("POST", served.url + "/api/chat", json=asking, timeout=60, trust_env=False) as reply:
        lines = reply.iter_lines()
        next(lines)
        served.server.handle_exit(signal.SIGTERM, None)
        assert "error" in json.loads([*lines][-1])
