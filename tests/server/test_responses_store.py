"""Responses that are kept for a while: what they hold, for whom, how long, and what is told when they are gone."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import ResponseItem
from pydantic import TypeAdapter

from edge_runtime.server import responses_store
from edge_runtime.server.errors import RequestError
from edge_runtime.server.openai.responses_items import listed_items, page
from edge_runtime.server.responses_store import NotKept, PreviousNotKept, ResponseStore, owner_of
from server.conftest import Served
from server.test_openai_replies import unknown_fields
from server.test_responses_events import read_response

ITEM: Any = TypeAdapter(ResponseItem)


def response(name: str, text: str = "Hi") -> dict[str, Any]:
    return {"id": name, "output": [{"id": f"msg_{name}", "type": "message", "role": "assistant", "content": text}]}


def question(name: str, text: str = "Who?") -> list[dict[str, Any]]:
    return [{"id": f"q_{name}", "type": "message", "role": "user", "content": text}]


def filled(n: int, **limits: Any) -> ResponseStore:
    """Conversations of one response each."""
    store = ResponseStore(**limits)
    for i in range(n):
        store.put("me", response(f"r{i}"), question(f"r{i}"), None)
    return store


def test_a_conversation_is_a_chain():
    store = filled(1)
    store.put("me", response("r1"), question("r1"), "r0")
    store.put("me", response("r2"), question("r2"), "r1")
    assert [item["id"] for item in store.conversation("me", "r2")] == [
        *("q_r0", "msg_r0", "q_r1", "msg_r1", "q_r2", "msg_r2")
    ]
    assert [item["id"] for item in store.input_items("me", "r2")][-1] == "q_r2"
    assert store.item("me", "msg_r1", "input[0]")["id"] == "msg_r1"


def test_nothing_is_seen_under_another_key():
    store = filled(1)
    for ask in (
        lambda: store.get("you", "r0"),
        lambda: store.delete("you", "r0"),
        lambda: store.input_items("you", "r0"),
        lambda: store.conversation("you", "r0"),
        lambda: store.item("you", "msg_r0", "input[0]"),
    ):
        with pytest.raises(NotKept):
            ask()
    store.put("you", response("mine") | {"output": [*response("r0")["output"]]}, [], None)
    store.delete("you", "mine")
    assert store.item("me", "msg_r0", "input[0]"), "an id of mine that you sent stays mine"
    assert owner_of({"authorization": "Bearer a"}) != owner_of({"authorization": "Bearer b"}) != owner_of({})


def test_number_bytes_and_age_are_bounded(monkeypatch):
    assert len(filled(5, max_responses=3)) == 3
    one = filled(1).n_bytes
    small = filled(5, max_bytes=2 * one)
    assert len(small) == 2
    assert small.n_bytes == 2 * one
    with pytest.raises(NotKept):
        small.item("me", "msg_r0", "input[0]")
    small.delete("me", "r4")
    small.delete("me", "r3")
    assert (small.n_bytes, small._items) == (0, {})
    now = [1000.0]
    monkeypatch.setattr(responses_store.time, "monotonic", lambda: now[0])
    store = ResponseStore(max_age_s=60)
    store.put("me", response("old"), question("old"), None)
    store._kept["old"].used = now[0]
    now[0] += 50
    assert store.get("me", "old"), "its use counts"
    now[0] += 50
    assert store.get("me", "old")
    now[0] += 61
    with pytest.raises(NotKept, match=r"keeps .* until it ends"):
        store.get("me", "old")


def test_what_a_conversation_goes_on_from_outlives_others():
    store = filled(3, max_responses=4)
    store.put("me", response("next"), question("next"), "r0")
    store.conversation("me", "next")
    store.put("me", response("new"), question("new"), None)
    store.put("me", response("newer"), question("newer"), None)
    assert len(store.conversation("me", "next")) == 4
    store.delete("me", "r0")
    with pytest.raises(PreviousNotKept) as error:
        store.conversation("me", "next")
    assert (error.value.param, error.value.code, error.value.status) == (
        "previous_response_id",
        "previous_response_not_found",
        400,
    )


def test_pages():
    items = [{"id": str(i)} for i in range(5)]
    first = page(items, order="desc", after=None, limit=2)
    assert ([item["id"] for item in first["data"]], first["has_more"]) == (["4", "3"], True)
    rest = page(items, order="desc", after=first["last_id"], limit=9)
    assert ([item["id"] for item in rest["data"]], rest["has_more"]) == (["2", "1", "0"], False)
    with pytest.raises(RequestError):
        page(items, order="asc", after="9", limit=1)


def test_items_are_listed_in_the_spelling_of_this_api():
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
    given = [
        {"role": "user", "content": "Hi"},
        {"role": "user", "content": [picture, {"type": "text", "text": "What?"}, "And?"]},
        {"role": "assistant", "content": "A dog."},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "yes"},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]},
    ]
    listed = listed_items(given)
    assert len({item["id"] for item in listed}) == len(listed)
    for item in listed:
        assert not unknown_fields(ITEM.validate_json(json.dumps(item), strict=True)), item


# --- with a server ----------------------------------------------------------------

SHORT: dict[str, Any] = {"model": "demo", "max_output_tokens": 20, "temperature": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_going_on_from_a_response(ai: openai.OpenAI, stream: bool):
    if stream:
        *_, done = ai.responses.create(input="Who are you?", stream=True, **SHORT)
        first = done.response
    else:
        first = ai.responses.create(input="Who are you?", **SHORT)
    raw = ai.responses.with_raw_response.create(input="And?", previous_response_id=first.id, **SHORT)
    second = read_response(json.loads(raw.text))
    assert second.previous_response_id == first.id
    answer = {"role": "assistant", "content": first.output_text}
    whole = [{"role": "user", "content": "Who are you?"}, answer, {"role": "user", "content": "And?"}]
    by_hand = ai.responses.create(input=whole, store=False, **SHORT)
    assert (second.usage.input_tokens, second.output_text) == (by_hand.usage.input_tokens, by_hand.output_text)
    counted = ai.responses.input_tokens.count(model="demo", input="And?", previous_response_id=first.id)
    assert counted.input_tokens == second.usage.input_tokens


def test_referring_to_an_item(ai: openai.OpenAI):
    first = ai.responses.create(input="Who are you?", **SHORT)
    for reference in ({"type": "item_reference", "id": first.output[0].id}, {"id": first.output[0].id}):
        asked: Any = [{"role": "user", "content": "Who are you?"}, reference, {"role": "user", "content": "And?"}]
        told = ai.responses.create(input=asked, **SHORT)
        by_id = ai.responses.create(input="And?", previous_response_id=first.id, **SHORT)
        assert told.usage.input_tokens == by_id.usage.input_tokens
    with pytest.raises(openai.NotFoundError, match="not stored here") as error:
        ai.responses.create(input=[{"type": "item_reference", "id": "msg_1"}], **SHORT)
    assert error.value.param == "input[0]"


def test_instructions_are_not_carried_over(ai: openai.OpenAI):
    first = ai.responses.create(input="Hi", instructions="Be very brief, and kind.", **SHORT)
    without = ai.responses.create(input="Hi", **SHORT)
    assert first.usage.input_tokens > without.usage.input_tokens
    one = ai.responses.create(input="And?", previous_response_id=first.id, **SHORT)
    other = ai.responses.create(input="And?", previous_response_id=without.id, **SHORT)
    assert one.usage.input_tokens == other.usage.input_tokens or first.output_text != without.output_text


def test_looking_back(ai: openai.OpenAI):
    first = ai.responses.create(input="Who are you?", **SHORT)
    second = ai.responses.create(input="And?", previous_response_id=first.id, **SHORT)
    assert ai.responses.retrieve(second.id) == second
    listed = ai.responses.input_items.list(second.id, order="asc", limit=2)
    assert [item.id for item in listed.data][1] == first.output[0].id
    assert [item.type for item in listed] == ["message"] * 3, "with the pages behind the first"
    with pytest.raises(openai.BadRequestError, match="background"):
        ai.responses.cancel(second.id)
    ai.responses.delete(second.id)
    for ask in (ai.responses.retrieve, ai.responses.delete, ai.responses.cancel, ai.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="not stored here"):
            ask(second.id)
    ai.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError) as error:
        ai.responses.create(input="And?", previous_response_id=first.id, **SHORT)
    assert (error.value.code, error.value.param) == ("previous_response_not_found", "previous_response_id")


def test_what_is_not_to_be_kept_is_not(ai: openai.OpenAI, server: Served):
    before = len(server.state.responses)
    told = ai.responses.create(input="Hi", store=False, **SHORT)
    assert len(server.state.responses) == before
    assert told.to_dict()["store"] is False
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(told.id)


def test_other_keys_see_nothing(ai: openai.OpenAI, client: httpx.Client):
    told = ai.responses.create(input="Hi", **SHORT)
    for key in ({}, {"Authorization": "Bearer other"}, {"x-api-key": "none"}):
        assert client.get(f"/v1/responses/{told.id}", headers=key).status_code == 404
        assert client.delete(f"/v1/responses/{told.id}", headers=key).status_code == 404
        body = {"input": "And?", "previous_response_id": told.id}
        assert client.post("/v1/responses", json=body, headers=key).status_code == 400
    assert ai.responses.retrieve(told.id).id == told.id
