"""A clock that is set, by years, while a server works: nothing expires, nothing is lost, nothing waits for ever."""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server.attacking import QUESTION, chat, is_idle, wait_until

YEAR_S = 365 * 86400


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set what programs call the time, but not what files are stamped with."""
    real, real_ns, shift = time.time, time.time_ns, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + shift[0])
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(shift[0] * 1e9))

    class Datetime(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.fromtimestamp(time.time(), tz)

    monkeypatch.setattr(datetime, "datetime", Datetime)
    return lambda years: shift.__setitem__(0, years * YEAR_S)


@pytest.mark.parametrize("years", [[-40, 0], [40, 0], [40, -40]], ids=["back", "forth", "to and fro"])
def test_nothing_depends_on_the_time_of_day(serve, set_clock, tmp_path, monkeypatch, years):
    monkeypatch.setenv("EDGE_RUNTIME_MODELS", str(tmp_path / "models"))
    served = serve(keep_alive_s=60.0, request_timeout_s=60.0, load={"cache_dir": tmp_path / "cache"})
    data = b"x" * 1000
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:

        def answer() -> str:
            reply = client.post("/api/chat", json=chat(messages=[QUESTION], options={"temperature": 0}))
            return str(reply.json()["message"]["content"])

        assert answer() == "CAFE"
        kept = client.post("/v1/responses", json={"model": "demo", "input": "Hi", "max_output_tokens": 2}).json()[
            "id"
        ]
        assert client.post(f"/api/blobs/{digest}", content=data).status_code == 201
        body = {"model": "mine", "from": "demo", "system": "x", "stream": False}
        assert client.post("/api/create", json=body).json() == {"status": "success"}
        (slot,) = served.state.registry.loaded()
        for shift in years:
            set_clock(shift)
            served.state.catalog.tidy()
            assert answer() == "CAFE"
            assert client.get(f"/v1/responses/{kept}").status_code == 200
            assert client.head(f"/api/blobs/{digest}").status_code == 200, (
                "an upload of today was taken for an old one"
            )
            names = {model["name"] for model in client.get("/api/tags").json()["models"]}
            assert {"mine:latest", "demo:latest"} <= names
            (running,) = client.get("/api/ps").json()["models"]
            expires = datetime.datetime.fromisoformat(running["expires_at"]).timestamp()
            assert 0 < expires - time.time() <= 61, "the model would seem to stay for years, or to be gone"
            assert served.state.registry.loaded() == [slot], "the model was loaded anew"
            body = {"model": "demo", "keep_alive": 0.2, "messages": []}
        assert client.post("/api/chat", json=body).status_code == 200
        wait_until(lambda: not served.state.registry.loaded())
        wait_until(lambda: is_idle(served))
