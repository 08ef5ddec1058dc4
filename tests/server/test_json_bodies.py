"""Bodies of JSON: how much of it is read, what is said of more, and that others are answered meanwhile."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import pytest
from starlette.exceptions import HTTPException

from edge_runtime.server.media import text_bytes
from edge_runtime.server.middleware import json_bodies
from edge_runtime.server.settings import Settings
from server.conftest import Served

MAX_VALUES, MAX_DEPTH = Settings.max_values, Settings.max_depth


def read(body: bytes, **settings: Any) -> Any:
    return json_bodies.read(body, Settings(**settings))


def test_values_are_counted_outside_of_strings():
    text = '[{,"\\' * MAX_VALUES
    assert read(json.dumps({"a": text, "b": [text]}).encode()) == {"a": text, "b": [text]}
    assert len(read(b"[" + b"0," * (MAX_VALUES - 2) + b"0]")) == MAX_VALUES - 1
    for item in (b"0", b"{}", b"[]", b'"",""'):
        with pytest.raises(HTTPException, match=f"more than {MAX_VALUES} values") as error:
            read(b"[" + (item + b",") * MAX_VALUES + b"0]")
        assert error.value.status_code == 413
    for body in (b"", b'"', b'{"a":', b'"\\'):
        with pytest.raises(json.JSONDecodeError):
            read(body)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 18])
def test_values_are_counted_piece_by_piece(monkeypatch, size):
    """Wherever a body is cut: escapes, quotes and runs of backslashes belong together."""
    monkeypatch.setattr(json_bodies, "PIECE_BYTES", size)
    texts = ["", ",", '"', "\\", '\\"', '",', "[{\\\\", 'a\\\\",[', "\n,", "\u0022", "\\" * 9 + ","]
    for one in texts:
        for other in texts:
            body = json.dumps({one: [other, 1, {"a": one + other}]}).encode()
            assert json_bodies._n_values(body, 1000) == 5, body
    assert json_bodies._n_values(b"[[[[[[" + b"\\" * 5, 3) >= 4


def test_a_large_body_holds_nobody_up():
    """40 MB of escapes: no step of the count is long."""
    body = b'{"a":"' + b'\\"' * 20_000_000 + b",[[," * 200_000 + b'"}'
    started = time.process_time()
    assert json_bodies._n_values(body, 100_000) == 1
    assert time.process_time() - started < 1.5  # it took 3 s in a single one


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}")])
def test_nesting_is_counted(opening, closing):
    def nested(n: int) -> bytes:
        return (opening * n + "1" + closing * n).encode()

    assert read(nested(MAX_DEPTH))
    for n in (MAX_DEPTH + 1, 900, 50_000):
        with pytest.raises(HTTPException, match=f"more than {MAX_DEPTH} levels of lists and objects") as error:
            read(nested(n))
        assert error.value.status_code == 400


def test_others_are_answered_while_large_bodies_are_refused(server: Served, client: httpx.Client):
    n = 700_000
    client.post("/api/chat", json={"model": "demo", "messages": [], "stream": False})
    attacks = {
        b'{"model":"demo","messages":[' + b"{}," * n + b"{}]}": 413,
        b'{"model":"demo","messages":[],"x":[' + b"[]," * n + b"[]]}": 413,
        b'{"model":"demo","messages":[],"x":' + b"[" * n + b"]" * n + b"}": 413,
        b'{"model":"demo","messages":[],"x":' + b"[" * 300 + b"]" * 300 + b"}": 400,
        b'{"model":"demo","stream":false,"messages":[{"role":"user","content":"' + b"a " * n + b'"}]}': 400,
    }
    for body, status in attacks.items():
        found: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda body=body, found=found: found.append(client.post("/api/chat", content=body))
        )
        asking.start()
        worst = 0.0
        while asking.is_alive():
            began = time.monotonic()
            assert httpx.get(f"{server.url}/health", trust_env=False, timeout=60).status_code == 200
            worst = max(worst, time.monotonic() - began)
            time.sleep(0.05)
        assert found[0].status_code == status, found[0].text[:200]
        assert found[0].json()["error"]
        assert worst < 1.0 + 1.0  # what is promised, and a busy machine


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"messages": [{}] * 5}, None, ""),
        ({"messages": [{}] * 6}, 413, "messages holds 6 messages, at most 5"),
        ({"input": [{}] * 6}, 413, "input holds 6 messages"),
        ({"messages": [{"content": [1] * 3}]}, None, ""),
        ({"messages": [{}, {"content": [1] * 4}]}, 413, "A message has 4 parts, at most 3"),
        ({"prompt": [1] * 6, "messages": {"content": [1] * 6}, "input": "text" * 9}, None, ""),
        ([{"messages": [1] * 9}], None, ""),
        ({"other": [1] * 16}, 413, "more than 16 values"),
        ({"a": {"b": {"c": {}}}}, None, ""),
        ({"a": {"b": {"c": [[]]}}}, 400, "more than 4 levels of lists and objects"),
    ],
)
def test_what_owners_may_limit(body, status, word):
    limits = {"max_messages": 5, "max_parts": 3, "max_values": 16, "max_depth": 4}
    if status is None:
        assert read(json.dumps(body).encode(), **limits) == body
        return
    with pytest.raises(HTTPException, match=word) as error:
        read(json.dumps(body).encode(), **limits)
    assert error.value.status_code == status


def test_large_bodies_are_validated_as_small_ones(client: httpx.Client):
    """In a thread, and with the same words; fields beside the wrong one make no difference."""
    for path, body in (
        ("/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": "a"}], "n": "x"}),
        ("/v1/messages", {"model": "demo", "max_tokens": "x", "messages": [{"role": "user", "content": "a"}]}),
        ("/api/chat", {"model": 5, "messages": []}),
        ("/tokenize", {"content": ["a"]}),
        ("/tokenize", {}),
    ):
        replies = [client.post(path, json={**body, "unused": " " * n}) for n in (1, 100_000)]
        assert [reply.status_code for reply in replies] == [400, 400], replies[1].text
        assert replies[0].json() == replies[1].json()
    ids = client.post("/tokenize", json={"content": "a b " * 10_000}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"content": "a b " * 10_000}


def test_text_to_be_cut_into_tokens_has_a_limit(client: httpx.Client):
    reply = client.post("/tokenize", json={"content": "ä" * (Settings.max_tokenize_bytes // 2 + 1)})
    assert reply.status_code == 413
    assert f"at most {Settings.max_tokenize_bytes} are tokenised" in reply.json()["error"]["message"]


def test_text_to_be_counted_has_a_limit(client: httpx.Client):
    for path in ("/v1/messages/count_tokens", "/v1/chat/completions/input_tokens", "/apply-template"):
        for begins in ("", "data:;base64,"):
            text = begins + "a" * Settings.max_tokenize_bytes
            reply = client.post(path, json={"model": "demo", "messages": [{"role": "user", "content": text + "a"}]})
            assert reply.status_code == 413, reply.text[:200]
            assert "of text, at most" in reply.text
    reply = client.post("/v1/responses/input_tokens", json={"model": "demo", "input": text + "a"})
    assert reply.status_code == 413


def test_what_counts_as_text():
    picture = "data:image/png;base64," + "A" * 1000
    message = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": picture}}, "ä"],
        "images": [picture],
    }
    assert text_bytes([]) == 0
    assert text_bytes("data:a") == 6
    assert 2 < text_bytes([message]) < 100
    assert text_bytes([{"content": [{"type": "text", "text": picture}]}]) > 1000
    assert text_bytes([{"content": picture}, {"parameters": {picture: 1}}]) > 2000
