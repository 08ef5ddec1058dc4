"""Clients that leave, at every point of a request: nothing of them stays, and nobody else's answer changes.

One server, and an honest client that asks all the while.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.attacking import QUESTION, chat, head, is_idle, post, wait_until
from server.conftest import Served
from server.test_ollama_client import GREEDY, hub
from support.hub_server import Fault, Hub

__all__ = ["hub"]

WORDS = [*"abcdefghijkl"]
LONG = {"format": {"type": "array", "items": {"enum": WORDS}, "minItems": 400, "maxItems": 400}}
DRAWN = {"num_predict": 3000, "temperature": 50.0, "top_k": 0, "top_p": 1.0}
ROUNDS = 2


def request(path: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    return head(path, f"Content-Length: {len(data)}", "Content-Type: application/json") + data


def streamed(**fields: Any) -> bytes:
    return request("/api/chat", chat(**{"stream": True, **LONG, "options": DRAWN, **fields}))


def upload(n_bytes: int) -> bytes:
    digest = hashlib.sha256(b"x" * n_bytes).hexdigest()
    return head(f"/api/blobs/sha256:{digest}", f"Content-Length: {n_bytes}") + b"x" * (n_bytes - 1000)


@contextlib.contextmanager
def client_of(served: Served, sent: bytes, *, resets: bool) -> Iterator[socket.socket]:
    """A connection that ends when the block does: closed, or reset in the middle of what is sent to it."""
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), 10) as connection:
        if resets:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(sent)
        yield connection


def is_busy(served: Served) -> bool:
    return served.state.inference.n_open > 1  # the honest client is there, too


def nothing(served: Served, connection: socket.socket) -> None:
    """Leave at once."""


def when_taken(served: Served, connection: socket.socket) -> None:
    wait_until(lambda: is_busy(served))


def when_told(served: Served, connection: socket.socket) -> None:
    """The first bytes of the answer are there."""
    assert connection.recv(200)


def after_a_while(served: Served, connection: socket.socket) -> None:
    """Some of the answer is read, and more is on its way."""
    for _ in range(5):
        assert connection.recv(200)


PICTURES = {**QUESTION, "images": QUESTION["images"] * 4}
OPENAI = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 2000}
PHASES: dict[str, tuple[bytes, Callable[[Served, socket.socket], None]]] = {
    "connected": (b"", nothing),
    "head": (head("/api/chat", "Content-Length: 100")[:-10], nothing),
    "body": (streamed()[:-20], nothing),
    "chunked body": (head("/api/chat", "Transfer-Encoding: chunked") + b"40\r\n{", nothing),
    "asked": (streamed(), nothing),
    "prepared": (streamed(messages=[PICTURES]), when_taken),
    "prefill": (streamed(messages=[{"role": "user", "content": "word " * 3000}]), when_taken),
    "decode": (streamed(), when_told),
    "whole": (streamed(stream=False), when_taken),
    "written": (streamed(), after_a_while),
    "several": (request("/v1/chat/completions", {**OPENAI, "n": 3}), when_told),
    "responses": (
        request("/v1/responses", {"model": "demo", "input": "Hi", "stream": True, "max_output_tokens": 2000}),
        when_told,
    ),
    "messages": (
        request("/v1/messages", {**OPENAI, "messages": [{"role": "user", "content": "Hi"}]}),
        when_told,
    ),
    "upload": (upload(5_000_000), nothing),
    "create": (request("/api/create", {"model": "left", "from": "demo", "system": "x"}), nothing),
}


def handles() -> int:
    """Open files of this process, where the system tells."""
    gc.collect()
    return len([*Path("/proc/self/fd").iterdir()]) if sys.platform == "linux" else 0


@pytest.fixture
def honest() -> Iterator[Callable[[Served], list[str]]]:
    """Begin to ask a server all the while; the answers, as they come."""
    over, answers, threads = threading.Event(), list[str](), list[threading.Thread]()

    def begin(served: Served) -> list[str]:
        def ask() -> None:
            body = chat(messages=[QUESTION], options=GREEDY)
            while not over.is_set():
                reply = httpx.post(served.url + "/api/chat", json=body, timeout=60, trust_env=False)
                answers.append(reply.json()["message"]["content"] if reply.status_code == 200 else reply.text)

        threads.append(threading.Thread(target=ask))
        threads[0].start()
        return answers

    def end() -> None:
        over.set()
        for thread in threads:
            thread.join(60)

    begin.end = end  # type: ignore[attr-defined]
    yield begin
    end()


def blobs(served: Served) -> list[str]:
    folder = served.state.catalog.library.root / ".served" / "blobs"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_clients_leave_at_every_point(hub: Hub, serve, honest):
    served = serve(request_timeout_s=120.0)
    post(served, "/api/chat", chat(messages=[QUESTION], options=GREEDY))
    answers = honest(served)
    wait_until(lambda: len(answers) > 0, 60)
    before = None
    for round_number in range(ROUNDS):
        for name, (sent, leave) in PHASES.items():
            for resets in (False, True):
                with client_of(served, sent, resets=resets) as connection:
                    leave(served, connection)
            assert set(answers) == {"CAFE"}, name
        with contextlib.ExitStack() as stack:  # more than there are sequences: most of them wait
            for _ in range(12):
                stack.enter_context(client_of(served, streamed(), resets=False))
            wait_until(lambda: served.state.inference.n_open >= 12, 60)
        n = len(answers)
        wait_until(lambda: len(answers) > n + 1, 60)  # noqa: B023 - somebody else is answered
        wait_until(lambda: served.state.inference.n_open <= 1, 60)
        wait_until(lambda: not [found for found in blobs(served) if found.startswith(".")])
        wait_until(lambda: len(served.server.server_state.connections) <= 1)
        now = handles()
        before = now if round_number == 0 else before
    assert before is not None
    assert now <= before + 3, "files or connections stay open"
    honest.end()
    assert set(answers) == {"CAFE"}
    wait_until(lambda: is_idle(served))
    (slot,) = served.state.registry.loaded()
    assert slot.users == 0
    scheduler = slot.model.engine.scheduler
    assert sorted(scheduler.sequences.idle) == list(range(slot.model.engine.decoder.n_sequences)), (
        "a sequence was not given back"
    )


def test_clients_leave_a_pull(hub: Hub, serve):
    """Whoever asks next gets the model; nothing of the first one holds the lock or a thread for long."""
    served = serve()
    for resets in (False, True):
        hub.stalled.clear()
        hub.released.clear()
        hub.faults.append(Fault(stall_after=200_000))
        with client_of(served, request("/api/pull", {"model": "hf:org/demo"}), resets=resets) as connection:
            assert connection.recv(1000)
            assert hub.stalled.wait(30)
        hub.released.set()
    reply = post(served, "/api/pull", {"model": "hf:org/demo", "stream": False})
    assert reply.json() == {"status": "success"}
    store = served.state.catalog.library.root
    assert not [path.name for path in store.rglob("*.part")]
    assert [model["name"] for model in httpx.get(served.url + "/api/tags", trust_env=False).json()["models"]] == [
        "demo:latest",
        "hf:org/demo:ggml-model-Q4_K_M.gguf",
    ]


def test_pulls_of_one_name_at_once(hub: Hub, serve):
    """In one server: one fetches, the others wait for it and are told so. One address may pull three at once."""
    served, replies = serve(), list[str]()
    hub.stalled.clear()
    hub.released.clear()
    hub.faults.append(Fault(stall_after=200_000))

    def ask() -> None:
        replies.append(post(served, "/api/pull", {"model": "hf:org/demo"}).text)

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    assert hub.stalled.wait(30)
    time.sleep(0.3)
    hub.released.set()
    for thread in asking:
        thread.join(60)
    assert [json.loads(reply.splitlines()[-1]) for reply in replies] == [{"status": "success"}] * 3, replies
    assert sum("waiting for another pull" in reply for reply in replies) == 2
    fetched = [headers for headers in hub.bytes_requests() if "range" not in headers]
    assert len(fetched) == 2, "one file was fetched twice"


def rss_anon() -> int:
    """Memory of this process that belongs to no file, in bytes."""
    text = Path("/proc/self/status").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def refused_requests() -> list[tuple[str, bytes, int]]:
    """What is not right in one way each: path, body, status."""

    def of(**fields: Any) -> bytes:
        return json.dumps(chat(**fields)).encode()

    deep = b'{"model": "demo", "messages": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    keys = {f"k{i}": {"enum": [f"v{i}{j}" for j in range(50)]} for i in range(200)}
    bad_picture = {"role": "user", "content": "?", "images": ["AAAA" * 50_000]}
    return [
        ("/api/chat", b'{"model": "demo", "messages": [{"role": "user", "content": "' + b"x" * 2_000_000, 400),
        ("/api/chat", deep, 400),
        ("/api/chat", b"\xff\xfe" * 500_000, 400),
        ("/api/chat", of(messages=[bad_picture]), 400),
        ("/api/chat", of(messages=[{"role": "user", "content": "word " * 60_000}]), 400),
        ("/api/chat", of(messages=[{"role": "user", "content": "word " * 9_000}], truncate=False), 400),
        (
            "/api/chat",
            of(format={"type": "object", "properties": keys, "required": ["nobody"], "$ref": "#/none"}),
            400,
        ),
        ("/api/chat", of(model="nobody"), 404),
        ("/v1/chat/completions", of(messages=[{"role": "user", "content": [{"type": "nothing"}]}]), 400),
        ("/v1/messages", of(max_tokens=-1), 400),
        ("/api/chat", bytes(5_000_000), 413),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory cannot be told from mapped files")
@pytest.mark.parametrize("n", [44, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_comes_back_after_requests_that_are_refused(serve, n):
    served = serve(max_body_bytes=4_000_000)
    requests = refused_requests()
    with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:

        def ask(times: int) -> None:
            for i in range(times):
                path, body, status = requests[i % len(requests)]
                reply = client.post(path, content=body, headers={"Content-Type": "application/json"})
                assert reply.status_code == status, (path, body[:80], reply.text[:300])

        client.post("/api/chat", json=chat(options={"num_predict": 2}))
        ask(4)  # what the first ones bring in: modules, threads
        before = rss_anon()
        ask(n)
        wait_until(lambda: rss_anon() < before + (100 << 20), 60)
        assert is_idle(served)
        assert client.post("/api/chat", json=chat(messages=[QUESTION])).json()["message"]["content"] == "CAFE"
