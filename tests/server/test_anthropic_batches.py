"""Message batches as Anthropic's package uses them, unchanged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from server.attacking import wait_until
from server.conftest import Served, openai_client
from server.test_batches import own_folder

__all__ = ["own_folder"]


@pytest.fixture
def served(own_folder: Path, serve: Callable[..., Served]) -> Served:
    return serve()


@pytest.fixture
def claude(served: Served) -> Iterator[anthropic.Anthropic]:
    plain = anthropic.DefaultHttpxClient(trust_env=False)
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0, http_client=plain) as client:
        yield client


def request(custom_id: str, text: str = "Hi", **params: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return {"custom_id": custom_id, "params": {"model": "demo", "max_tokens": 3, "messages": messages, **params}}


def ended(claude: anthropic.Anthropic, batch_id: str) -> Any:
    end = time.monotonic() + 60
    while (found := claude.messages.batches.retrieve(batch_id)).processing_status != "ended":
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def test_a_batch_from_its_start_to_its_end(claude, served, own_folder):
    made = claude.messages.batches.create(
        requests=[
            *(request(f"id-{i}") for i in range(4)),
            request("wrong", messages="none"),
            request("who", model="x"),
        ]
    )
    assert (made.type, made.processing_status, made.request_counts.processing) == ("message_batch", "in_progress", 6)
    assert made.results_url is None
    done = ended(claude, made.id)
    assert (done.request_counts.succeeded, done.request_counts.errored, done.request_counts.processing) == (4, 2, 0)
    assert done.created_at <= done.ended_at <= done.expires_at
    found = {line.custom_id: line.result for line in claude.messages.batches.results(made.id)}
    assert len(found) == 6
    assert {found[f"id-{i}"].type for i in range(4)} == {"succeeded"}
    assert found["id-0"].message.usage.output_tokens
    assert (found["wrong"].type, found["wrong"].error.error.type) == ("errored", "invalid_request_error")
    assert found["who"].error.error.type == "not_found_error"
    with openai_client(served) as ai:
        assert [*ai.files.list()] == []
        assert [*ai.batches.list()] == []
    assert claude.messages.batches.delete(made.id).type == "message_batch_deleted"
    with pytest.raises(anthropic.NotFoundError, match="No batch has the id"):
        claude.messages.batches.retrieve(made.id)
    assert [*(own_folder / "batches").iterdir()] == [*(own_folder / "files").iterdir()] == []


def test_cancelling(claude, endless):
    made = claude.messages.batches.create(requests=[request(f"{i}", max_tokens=1500) for i in range(12)])
    with pytest.raises(anthropic.BadRequestError, match="has not ended"):
        claude.get(f"/v1/messages/batches/{made.id}/results", cast_to=object)
    with pytest.raises(anthropic.ConflictError, match="cancel it before"):
        claude.messages.batches.delete(made.id)
    assert claude.messages.batches.cancel(made.id).processing_status in ("canceling", "ended")
    done = ended(claude, made.id)
    assert done.cancel_initiated_at
    counts = done.request_counts
    assert (counts.succeeded + counts.canceled, counts.errored, counts.expired) == (12, 0, 0)
    kinds = [line.result.type for line in claude.messages.batches.results(made.id)]
    assert kinds.count("canceled") == counts.canceled > 0


def test_what_is_not_done_in_time_expires(claude, served, monkeypatch):
    monkeypatch.setattr(served.state.batches, "_is_asked", lambda: True)
    made = claude.messages.batches.create(requests=[request("a"), request("b")])
    monkeypatch.setattr("edge_runtime.server.batches.runner.time.time", lambda now=time.time: now() + 86_401)
    assert ended(claude, made.id).request_counts.expired == 2
    assert {line.result.type for line in claude.messages.batches.results(made.id)} == {"expired"}


def test_batches_are_listed_by_pages(claude):
    made = [claude.messages.batches.create(requests=[request("a")]).id for _ in range(5)]
    newest = made[::-1]
    assert [batch.id for batch in claude.messages.batches.list(limit=2)] == newest
    before = claude.messages.batches.list(limit=2, before_id=newest[3])
    assert [batch.id for batch in before.data] == newest[1:3]
    assert claude.messages.batches.list(after_id=newest[-1]).data == []
    with pytest.raises(anthropic.BadRequestError, match="after_id"):
        claude.messages.batches.list(after_id="msgbatch_x")


@pytest.mark.parametrize(
    "requests, reason",
    [
        ([], "requests holds 0"),
        ([request("a"), request("a")], "requests.1.custom_id is 'a'"),
        ([request("a b")], "expected 1 to 64"),
        ([request("")], "expected 1 to 64"),
        ([request("a", stream=True)], "stream is set"),
        ([{"custom_id": "a"}], "params"),
        ("none", "requests"),
    ],
    ids=range(7),
)
def test_refused(claude, own_folder, requests, reason):
    with pytest.raises(anthropic.BadRequestError, match=reason) as caught:
        claude.messages.batches.create(requests=requests)
    assert caught.value.body["type"] == "error"
    assert not (own_folder / "files").exists() or [*(own_folder / "files").iterdir()] == []


def test_batches_of_openais_clients_are_others(claude, served):
    made = claude.messages.batches.create(requests=[request("a")])
    reply = httpx.get(f"{served.url}/v1/batches/{made.id}", trust_env=False)
    assert reply.status_code == 404
    wait_until(lambda: claude.messages.batches.retrieve(made.id).processing_status == "ended", 60)
