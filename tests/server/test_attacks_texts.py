"""Long texts at a running server: nobody waits for them, and they are given up when their client leaves."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from edge_runtime.prompt import build, long_text, templates, tokenizer
from edge_runtime.server.context_tokens import ids_of
from edge_runtime.server.inference import TEXT_THREADS
from edge_runtime.system.turns import Turns
from server.attacking import Serve, chat, connected, head, is_idle, post, wait_until

WORDS = "word " * 5000
"""Long, but within what the context could hold."""
COUNTED = {"model": "demo", "messages": [{"role": "user", "content": "word " * 190_000}]}


def use(monkeypatch: pytest.MonkeyPatch, turns: Turns) -> None:
    """Let all long texts wait for these turns."""
    for module in (build, long_text, tokenizer, templates):
        monkeypatch.setattr(module, "LONG_TEXTS", turns)


class SlowTurns(Turns):
    """Turns in which every piece takes a while, and is counted."""

    def __init__(self) -> None:
        super().__init__(1)
        self.n_taken = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        is_piece = self._has_turn
        with super().turn():
            if is_piece:
                self.n_taken += 1
                time.sleep(0.1)
            yield


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[contextlib.ExitStack]:
    """Somebody has the only turn until this is closed."""
    turns = Turns(1)
    use(monkeypatch, turns)
    with contextlib.ExitStack() as stack:
        stack.enter_context(turns.turn())
        yield stack


def n_waiting() -> int:
    return len(long_text.LONG_TEXTS._waiting)


@pytest.mark.parametrize(
    "path", ["/v1/messages/count_tokens", "/v1/chat/completions/input_tokens", "/apply-template"]
)
def test_a_text_is_given_up_when_its_client_leaves(serve: Serve, monkeypatch: pytest.MonkeyPatch, path: str):
    served = serve()
    post(served, "/api/chat", chat(options={"num_predict": 1}))
    turns = SlowTurns()
    use(monkeypatch, turns)
    data = json.dumps(COUNTED).encode()
    with connected(served, head(path, f"Content-Length: {len(data)}") + data):
        wait_until(lambda: turns.n_taken >= 2, 60)
    wait_until(lambda: is_idle(served), 60)
    time.sleep(0.3)  # for the piece that was at work
    n_taken = turns.n_taken
    time.sleep(1.0)
    assert turns.n_taken == n_taken < len(COUNTED["messages"][0]["content"]) // 40_000  # type: ignore[index]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", chat(messages=[{"role": "user", "content": WORDS}], options={"num_predict": 1})),
        ("/v1/messages/count_tokens", COUNTED),
        ("/completion", {"prompt": [40, WORDS, 41], "n_predict": 1}),
    ],
)
def test_nobody_waits_for_long_texts(serve: Serve, taken: contextlib.ExitStack, path: str, body: dict[str, Any]):
    """Neither on the event loop nor for the threads of short texts."""
    served, n = serve(), TEXT_THREADS + 2
    with ThreadPoolExecutor(n) as clients:
        asking = [clients.submit(post, served, path, body) for _ in range(n)]
        try:
            wait_until(lambda: n_waiting() == n, 60)
            assert httpx.get(served.url + "/health", trust_env=False).status_code == 200
            assert post(served, "/api/chat", chat(options={"num_predict": 1})).status_code == 200
            assert n_waiting() == n
        finally:
            taken.close()
        replies = [found.result() for found in asking]
    assert {reply.status_code for reply in replies} <= {200, 400}, replies[0].text
    assert len({reply.status_code for reply in replies}) == 1


def test_who_waits_for_a_turn_at_the_end_is_told_so(serve: Serve, taken: contextlib.ExitStack):
    """With the status that says so, not a 500."""
    served = serve(grace_s=0.3)
    with ThreadPoolExecutor(1) as clients:
        asking = clients.submit(post, served, "/v1/messages/count_tokens", COUNTED)
        wait_until(lambda: n_waiting() == 1, 60)
        served.server.handle_exit(signal.SIGTERM, None)
        reply = asking.result()
        taken.close()
    assert reply.status_code == 503
    assert "shutting down" in reply.text


def test_a_text_that_is_read_at_the_end_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    served, turns = serve(grace_s=0.3), SlowTurns()
    post(served, "/api/chat", chat(options={"num_predict": 1}))
    use(monkeypatch, turns)
    with ThreadPoolExecutor(1) as clients:
        asking = clients.submit(post, served, "/v1/messages/count_tokens", COUNTED)
        wait_until(lambda: turns.n_taken > 0, 60)
        served.server.handle_exit(signal.SIGTERM, None)
        reply = asking.result()
    assert reply.status_code == 503
    names = [thread.name for thread in threading.enumerate()]
    wait_until(lambda: "edge-runtime pictures" not in str(names) or turns.n_taken < 20, 30)


@pytest.mark.parametrize(
    ("bias", "word"),
    [
        ([["7" * 5000, 1]], "token id"),
        ({"7" * 5000: 1}, "token id"),
        ([[5, 10**4000]], "logit_bias"),
        ({"5": -(10**400)}, "logit_bias"),
        ([["word " * 3000, 1]], "more than 10000 characters"),
        ([[f"word {i}", 1] for i in range(2000)], "more than 10000 characters"),
    ],
)
def test_texts_and_numbers_without_end_in_logit_bias(server, client, bias: Any, word: str):
    reply = client.post("/completion", json={"prompt": "Hello", "n_predict": 1, "logit_bias": bias})
    assert reply.status_code == 400
    assert word in reply.text
    assert len(reply.text) < 500


def test_a_part_of_a_prompt_that_no_context_holds(server, client):
    for text in ("a" * 3_000_000, "<|im_end|>" * 200_000):
        reply = client.post("/completion", json={"prompt": [40, text], "n_predict": 1})
        assert reply.status_code == 400
        assert "at least" in reply.text
        assert reply.json()["error"]["type"] == "exceed_context_size_error"


def test_a_turn_that_was_dropped_is_not_tokenised_for_the_context(server, client, monkeypatch: pytest.MonkeyPatch):
    """Clients of /api/generate get the conversation as ids; a turn of any length may have been left out of it."""
    client.post("/api/chat", json=chat(options={"num_predict": 1}))
    (slot,) = [slot for slot in server.state.registry.loaded() if slot.model is not None][:1]
    model = slot.model
    seen, encode = [], tokenizer.Tokenizer.encode

    def recorded(self: tokenizer.Tokenizer, text: str, *arguments: Any) -> list[int]:
        seen.append(len(text))
        return encode(self, text, *arguments)

    monkeypatch.setattr(tokenizer.Tokenizer, "encode", recorded)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "word " * 100_000},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]
    assert ids_of(turns, model.tokenizer, model.n_ctx) == ids_of([turns[0], *turns[2:]], model.tokenizer, model.n_ctx)
    assert max(seen) < 100
