"""Fields that bind an answer, in the words of several servers, against the demo model: the answer keeps them."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from edge_runtime.server.errors import RequestError
from server.openai_bodies import SCHEMA, chat, responses

ROUTES: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 60},
    "completions": {"prompt": "I am", "max_tokens": 60},
    "responses": {"input": "Who are you?", "max_output_tokens": 60},
}
SMALL = {**SCHEMA, "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}}}
WRAPPED = {"type": "json_schema", "json_schema": {"name": "a", "schema": SMALL}}
GBNF = 'root ::= ("yes" | "no") tail?\ntail ::= ", " [a-c]+ "."\n'


def is_small(text: str) -> bool:
    found = json.loads(text)
    return [*found] == ["a"] and 0 <= found["a"] <= 99


def matches(pattern: str) -> Any:
    return lambda text: re.fullmatch(pattern, text) is not None


FORMS: list[tuple[dict[str, Any], Any]] = [
    ({"json_schema": SMALL}, is_small),
    ({"json_schema": json.dumps(SMALL)}, is_small),
    ({"guided_json": SMALL}, is_small),
    ({"guided_json": json.dumps(SMALL)}, is_small),
    ({"format": SMALL}, is_small),
    ({"format": "json"}, lambda text: isinstance(json.loads(text), dict)),
    ({"structured_outputs": {"json": SMALL}}, is_small),
    ({"structured_outputs": {"json_object": True}}, lambda text: isinstance(json.loads(text), dict)),
    ({"structured_outputs": {"choice": ["red", "dark blue"], "regex": None}}, matches("red|dark blue")),
    ({"structured_outputs": {"regex": "[0-9]{3}"}}, matches("[0-9]{3}")),
    ({"structured_outputs": {"grammar": GBNF}}, matches(r"(yes|no)(, [a-c]+\.)?")),
    ({"guided_choice": ["örange", "漢字", "a.*", "(b|c)"]}, matches(r"örange|漢字|a\.\*|\(b\|c\)")),
    ({"guided_regex": "^[a-c]{2}-[0-9]{1,4}$"}, matches("[a-c]{2}-[0-9]{1,4}")),
    ({"regex": "(north|south) [1-9]"}, matches("(north|south) [1-9]")),
    ({"guided_grammar": GBNF}, matches(r"(yes|no)(, [a-c]+\.)?")),
    ({"grammar": GBNF}, matches(r"(yes|no)(, [a-c]+\.)?")),
    ({"grammar": {"type": "json", "value": SMALL}}, is_small),
    ({"grammar": {"type": "regex", "value": "[xyz]{4}"}}, matches("[xyz]{4}")),
]


def text_of(route: str, reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    body = reply.json()
    if route == "responses":
        return body["output"][-1]["content"][0]["text"]
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["text"] if route == "completions" else choice["message"]["content"]


@pytest.mark.parametrize(
    ("route", "fields", "keeps"),
    [
        *(("chat/completions", *form) for form in FORMS),
        *((route, *form) for route in ("completions", "responses") for form in FORMS[::4]),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value)[:40],
)
def test_the_answer_has_the_form(client: httpx.Client, route: str, fields: dict[str, Any], keeps: Any):
    text = text_of(route, client.post(f"/v1/{route}", json={**ROUTES[route], "seed": 3, **fields}))
    assert keeps(text), text


@pytest.mark.parametrize("wanted", [WRAPPED, {"type": "json_schema", "schema": SMALL}])
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_response_formats(client: httpx.Client, route: str, wanted: dict[str, Any]):
    assert is_small(text_of(route, client.post(f"/v1/{route}", json={**ROUTES[route], "response_format": wanted})))


def test_a_form_behind_reasoning(client: httpx.Client):
    body = {**ROUTES["chat/completions"], "guided_choice": ["left", "right"], "reasoning_effort": "low"}
    message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert message["content"] in ("left", "right")
    assert message["reasoning"]


def test_a_form_that_is_cut_says_so(client: httpx.Client):
    body = {**ROUTES["chat/completions"], "regex": "a{40}", "max_tokens": 3}
    choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert set(choice["message"]["content"]) == {"a"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"json_schema": SMALL, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": WRAPPED, "grammar": GBNF}, "grammar"),
        ({"structured_outputs": {"json": SMALL, "choice": ["a"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json_object": True, "whitespace_pattern": " "}}, "structured_outputs.whitespace"),
        ({"structured_outputs": {"json_object": "yes"}}, "structured_outputs.json_object"),
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": [1]}, "json_schema"),
        ({"json_schema": {"type": "set"}}, "json_schema"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_regex": "a" * 200_000}, "guided_regex"),
        ({"regex": r"(?=a)b"}, "regex"),
        ({"grammar": "root = nonsense ::"}, "grammar"),
        ({"grammar": 5}, "grammar"),
        ({"grammar": {"type": "xml", "value": "a"}}, "grammar"),
        ({"format": 5}, "format"),
        ({"min_tokens": 5, "json_schema": SMALL}, "min_tokens"),
        ({"min_tokens": 5, "stop": ["a"]}, "min_tokens"),
        ({"ignore_eos": True, "guided_choice": ["a"]}, "ignore_eos"),
        ({"allowed_token_ids": [1 << 30]}, "allowed_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ],
)
@pytest.mark.parametrize("route", ROUTES)
def test_what_cannot_be_kept_is_refused_by_name(client: httpx.Client, route: str, fields: dict[str, Any], param: str):
    if route == "responses" and "response_format" in fields:
        fields = {**fields, "text": {"format": {"type": "json_schema", "name": "a", "schema": SMALL}}}
        fields.pop("response_format")
    reply = client.post(f"/v1/{route}", json={**ROUTES[route], **fields})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert (error["param"] or "").startswith(param), error
    assert param.split(".")[0] in error["message"]


def test_the_same_form_twice_is_one_form():
    """Clients that do not know the server say it in several ways."""
    options = chat(response_format=WRAPPED, json_schema=SMALL, guided_json=json.dumps(SMALL)).options()
    assert options["schema"] == SMALL
    with pytest.raises(RequestError):
        responses(guided_choice=["a"], text={"format": {"type": "json_object"}}).options()


def answer(client: httpx.Client, **fields: Any) -> Any:
    reply = client.post("/v1/chat/completions", json={**ROUTES["chat/completions"], "temperature": 0, **fields})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    return body["choices"][0]["message"]["content"], body["choices"][0]["finish_reason"], body["usage"]


def test_rules_of_tokens(client: httpx.Client):
    plain, reason, usage = answer(client)
    assert (plain, reason) == ("I am a tiny demo model.", "stop")
    n = usage["completion_tokens"]
    longer, _, usage = answer(client, min_tokens=n + 5)
    assert longer.startswith(plain)
    assert usage["completion_tokens"] > n + 5 or usage["completion_tokens"] == n + 6
    endless, reason, usage = answer(client, ignore_eos=True, max_tokens=20)
    assert (reason, usage["completion_tokens"]) == ("length", 20)
    assert endless.startswith(plain)
    ids = client.post("/tokenize", json={"content": " tiny"}).json()["tokens"]
    assert answer(client, stop_token_ids=ids)[:2] == ("I am a", "stop")
    allowed = client.post("/tokenize", json={"content": "xyz"}).json()["tokens"]
    text, reason, _ = answer(client, allowed_token_ids=allowed, max_tokens=6)
    assert set(text) <= set("xyz")
    assert reason == "length"


def test_ends_of_the_model_may_be_named_as_such(client: httpx.Client):
    """Clients of vLLM name the model's own end tokens; a schema ends with them, too."""
    ids = client.post("/tokenize", json={"content": "<|im_end|>"}).json()["tokens"]
    assert answer(client, stop_token_ids=ids)[0] == "I am a tiny demo model."
    assert is_small(answer(client, stop_token_ids=ids, json_schema=SMALL)[0])


def test_names_of_the_same_number(client: httpx.Client):
    assert answer(client, n_predict=2, max_tokens=None)[2]["completion_tokens"] == 2
    assert chat(repeat_penalty=1.5).options()["repetition_penalty"] == 1.5
    assert chat(repeat_penalty=1.5, repeat_last_n=0).options()["repetition_penalty"] == 1.0
    assert chat(n_predict=-2).options() == {"thinking": False}
    assert chat(logit_bias=[[17, False], ["18", 2.5]]).options()["logit_bias"] == {"17": -100.0, "18": 2.5}
    for fields in ({"enable_thinking": True}, {"think": True}, {"think": "high"}):
        assert chat(**fields).options()["thinking"]
    assert chat(think="low").options()["thinking_budget"] == chat(reasoning_effort="low").options()["thinking_budget"]
    for name in ("thinking_budget", "thinking_token_budget", "thinking_budget_tokens"):
        assert chat(enable_thinking=True, **{name: 7}).options()["thinking_budget"] == 7
