"""Bodies of JSON: how much of it is read, what is said of more, and that others are answered meanwhile."""

from __future__ import annotations

import json
import threading
import time

import httpx
import pytest
from starlette.exceptions import HTTPException

from edge_runtime.server.json_bodies import MOST_DEPTH, MOST_VALUES, read
from server.conftest import Served


def test_values_are_counted_outside_of_strings():
    text = '[{,"\\' * MOST_VALUES
    assert read(json.dumps({"a": text, "b": [text]}).encode()) == {"a": text, "b": [text]}
    assert len(read(b"[" + b"0," * (MOST_VALUES - 2) + b"0]")) == MOST_VALUES - 1
    for item in (b"0", b"{}", b"[]", b'"",""'):
        with pytest.raises(HTTPException, match=f"more than {MOST_VALUES} values") as error:
            read(b"[" + (item + b",") * MOST_VALUES + b"0]")
        assert error.value.status_code == 413
    for body in (b"", b'"', b'{"a":', b'"\\'):
        with pytest.raises(json.JSONDecodeError):
            read(body)


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}")])
def test_nesting_is_counted(opening, closing):
    def nested(n: int) -> bytes:
        return (opening * n + "1" + closing * n).encode()

    assert read(nested(MOST_DEPTH))
    for n in (MOST_DEPTH + 1, 900, 50_000):
        with pytest.raises(HTTPException, match=f"more than {MOST_DEPTH} lists and objects") as error:
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
