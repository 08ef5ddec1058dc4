"""Files that take for ever to decode, sent to a server: everybody else is answered meanwhile, and nothing is left."""

from __future__ import annotations

import base64
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from server.attacking import QUESTION, Serve, chat, is_idle, post, wait_until
from server.test_serve_command import process
from support.document_maker import endless_pdf

ENDLESS = base64.b64encode(endless_pdf()).decode()
URI = f"data:application/pdf;base64,{ENDLESS}"


def document(*parts: Any) -> dict[str, Any]:
    """A question about a page that takes for ever to draw."""
    return chat(messages=[{"role": "user", "content": [{"type": "pdf", "pdf": URI}, *parts]}])


ROUTES = {
    "ollama": ("/api/chat", document()),
    "ollama's images": ("/api/generate", {"model": "demo", "prompt": "?", "images": [ENDLESS], "stream": True}),
    "openai": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_data": URI}}]}], "stream": True},
    ),
    "responses": (
        "/v1/responses",
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_data": URI}]}]},
    ),
    "anthropic": (
        "/v1/messages/count_tokens",
        {
            "model": "demo",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "document",
                            "source": {"type": "base64", "media_type": "application/pdf", "data": ENDLESS},
                        }
                    ],
                }
            ],
        },
    ),
}
FEW: dict[str, Any] = {"options": {"num_predict": 2}}


def test_everybody_else_is_answered_while_pages_are_drawn_for_ever(serve: Serve):
    """By all routes; the clients wait. Then they leave, and nothing is left of it."""
    served = serve(decode_timeout_s=600.0, request_timeout_s=600.0)
    clients = [httpx.Client(base_url=served.url, timeout=600, trust_env=False) for _ in ROUTES]
    decoders = served.state.inference.decoders
    with ThreadPoolExecutor(len(ROUTES)) as threads:
        asked = [
            threads.submit(c.post, path, json=body) for c, (path, body) in zip(clients, ROUTES.values(), strict=True)
        ]
        try:
            wait_until(lambda: decoders.n_slow == len(ROUTES), 120)
            assert post(served, "/api/chat", chat(**FEW)).status_code == 200
            assert post(served, "/api/chat", chat(messages=[QUESTION], **FEW)).status_code == 200
            assert httpx.get(served.url + "/health", trust_env=False).status_code == 200
            assert decoders.n_slow == len(ROUTES)  # all that while they were at work
        finally:
            for client in clients:
                _hang_up(client)
        wait_until(lambda: is_idle(served) and decoders.n_slow == 0, 30)
        wait_until(lambda: len(decoders.pids) <= 2, 30)
        assert all(isinstance(found.exception(60), httpx.HTTPError | ValueError) for found in asked)
    assert post(served, "/api/chat", chat(messages=[QUESTION], **FEW)).status_code == 200


def _hang_up(client: httpx.Client) -> None:
    """Close a client's connections under a request that waits."""
    for connection in client._transport._pool.connections:  # type: ignore[attr-defined]
        stream = connection._connection._network_stream
        stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("route", ROUTES)
def test_what_takes_too_long_is_refused_in_one_sentence(serve: Serve, route):
    served = serve(decode_timeout_s=0.5)
    path, body = ROUTES[route]
    reply = post(served, path, body)
    assert reply.status_code == 400
    assert "Page 1 of The " in reply.text
    assert "takes longer than 0.5 s to decode, which is the limit" in reply.text
    assert "--decode-timeout" in reply.text


def test_the_end_comes_while_pages_are_drawn_for_ever(tmp_path):
    """SIGTERM: the process is gone after the grace time, and its workers with it."""
    options = ("--grace", "0.5", "--decode-timeout", "600", "-m", "demo")
    with process(tmp_path, *options) as (child, address):
        threads = [
            threading.Thread(target=_ask, args=(address + path, body), daemon=True) for path, body in ROUTES.values()
        ]
        for thread in threads:
            thread.start()
        time.sleep(4)
        child.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert child.wait(30) == 0
        assert time.monotonic() - started < 0.5 + 2 + 1.5  # grace, what is promised, and a busy machine


def _ask(url: str, body: Any) -> None:
    try:
        httpx.post(url, json=body, timeout=60, trust_env=False)
    except httpx.HTTPError:
        return
