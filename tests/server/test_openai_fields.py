"""What becomes of every field that a client may send: it is read, refused by its name, or cannot change an answer."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsStreaming as TextParams
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming as ResponseParams

from edge_runtime.server.errors import RequestError
from edge_runtime.server.fields.refused import OF_CHAT, OF_COMPLETIONS, OF_RESPONSES, PASSED_OVER, REFUSED
from edge_runtime.server.openai.requests import ChatCompletionRequest, CompletionRequest
from edge_runtime.server.openai.responses_requests import ResponsesRequest

HI = [{"role": "user", "content": "Hi"}]
ROUTES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "chat/completions": (ChatCompletionRequest, {"messages": HI}, OF_CHAT),
    "completions": (CompletionRequest, {"prompt": "Hi"}, OF_COMPLETIONS),
    "responses": (ResponsesRequest, {"input": "Hi"}, OF_RESPONSES),
}
REFUSALS = [
    (route, name)
    for route, (kind, _, own) in ROUTES.items()
    for name in {**REFUSED, **own}
    if name not in kind.model_fields
]


def asked(route: str, **fields: Any) -> list[str]:
    kind, needed, _ = ROUTES[route]
    return kind.model_validate({**needed, **fields}).all_warnings()


def wishes(rule: Any) -> list[Any]:
    """Values that ask for something."""
    return [value for value in ("wanted", 17.5, ["a"], {"a": 1}, True) if value not in rule.harmless]


@pytest.mark.parametrize(("route", "name"), REFUSALS)
def test_what_is_not_done_is_refused_by_name(route, name):
    rule = {**REFUSED, **ROUTES[route][2]}[name]
    values = wishes(rule) + ([False] if True in rule.harmless and 1 not in [*map(type, rule.harmless)] else [])
    for value in values:
        if value is True and any(item == 1 for item in rule.harmless):
            continue
        if value is False and not any(item is True for item in rule.harmless):
            continue
        with pytest.raises(RequestError) as error:
            asked(route, **{name: value})
        assert error.value.param == name, value
        assert str(error.value).startswith(f"{name} is "), value
    for value in (None, [], {}, *rule.harmless):
        assert asked(route, **{name: value}) == [], value


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", sorted(PASSED_OVER))
def test_what_cannot_change_an_answer_is_passed_over(route, name):
    for value in ("a", 5, True, {"a": 1}):
        if name not in ROUTES[route][0].model_fields:
            assert asked(route, **{name: value}) == []


def test_no_field_is_in_two_lists():
    for kind, _, own in ROUTES.values():
        assert not PASSED_OVER & {*REFUSED, *own}
        assert not {*own} & {*kind.model_fields} - {"suffix", "best_of", "top_logprobs"}


@pytest.mark.parametrize(
    ("route", "params"),
    [("chat/completions", ChatParams), ("completions", TextParams), ("responses", ResponseParams)],
)
def test_every_field_that_openai_has_is_decided(route, params):
    kind, _, own = ROUTES[route]
    known = {*kind.model_fields, *PASSED_OVER, *REFUSED, *own}
    names = {name for base in params.__mro__ for name in getattr(base, "__annotations__", {})}
    assert len(names) > 15
    assert names <= known


@pytest.mark.parametrize("route", ROUTES)
def test_fields_that_nobody_knows_are_told(client: httpx.Client, route: str, caplog: pytest.LogCaptureFixture):
    limit = "max_output_tokens" if route == "responses" else "max_tokens"
    body = {**ROUTES[route][1], limit: 1, f"unheard_of_{route[:4]}é": 1}
    with caplog.at_level(logging.WARNING):
        reply = client.post(f"/v1/{route}", json=body)
        client.post(f"/v1/{route}", json=body)
    assert reply.status_code == 200
    assert reply.headers["warning"].startswith('299 edge-runtime "Unknown fields were ignored: un')
    assert caplog.text.count(f"unheard_of_{route[:4]}é") == 1, "the log says it once"
    assert "warning" not in client.post(f"/v1/{route}", json={**ROUTES[route][1], limit: 1}).headers


def test_how_a_model_is_loaded_is_the_owners_to_say():
    """Clients of Ollama send it under `options` here, too."""
    assert asked("chat/completions", options={"num_ctx": 8192, "num_thread": 4}) == []
    with pytest.raises(RequestError, match="options is"):
        asked("chat/completions", options={"num_ctx": 8192, "temperature": 0})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"include": ["everything"]}, "include"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "custom", "name": "a"}]}, "tools[0]"),
        ({"tools": [{"type": "namespace", "name": "a", "tools": []}]}, "tools[0]"),
        ({"tools": [{"type": "functoin", "name": "a", "parameters": {}}]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [{"type": "mcp"}], "tool_choice": {"type": "function", "name": "a"}}, "tool_choice"),
    ],
)
def test_responses_refuse_by_place(client: httpx.Client, fields: dict[str, Any], param: str):
    reply = client.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 1, **fields})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"].startswith(param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"enable_thinking": False, "style": "a"}}, "chat_template_kwargs.style"),
        ({"n_predict": 0}, "n_predict"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"repeat_penalty": 1000}, "repeat_penalty"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repeat_penalty"),
        ({"temperature": 1000}, "temperature"),
        ({"logit_bias": [[1, 2, 3]]}, "logit_bias"),
        ({"logit_bias": {"foo": 1}}, "logit_bias"),
        ({"logit_bias": [[5, True]]}, "logit_bias"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
    ],
)
def test_chats_refuse_by_place(client: httpx.Client, fields: dict[str, Any], param: str):
    reply = client.post("/v1/chat/completions", json={"messages": HI, **fields})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param
    assert param.split(".")[0].partition("s[")[0] in error["message"], "an error names the field that was sent"


@pytest.mark.parametrize(
    "kind", ["web_search", "web_search_preview", "file_search", "mcp", "code_interpreter", "shell"]
)
@pytest.mark.parametrize("route", ["chat/completions", "responses"])
def test_tools_of_openais_servers_are_left_out(client: httpx.Client, route: str, kind: str):
    function: dict[str, Any] = {"name": "look", "parameters": {"type": "object", "properties": {}}}
    nested = {"type": "function", "function": function}
    flat = {"type": "function", **function}
    limit = "max_output_tokens" if route == "responses" else "max_tokens"
    body = {**ROUTES[route][1], limit: 4, "tools": [{"type": kind}, flat if route == "responses" else nested]}
    reply = client.post(f"/v1/{route}", json=body)
    assert reply.status_code == 200, reply.text
    assert f"were left out: {kind}" in reply.headers["warning"]
    alone = client.post(f"/v1/{route}", json={**body, "tools": [{"type": kind}]})
    assert alone.status_code == 200, "nothing says that one must be called"
    streamed = client.post(f"/v1/{route}", json={**body, "stream": True})
    assert f"were left out: {kind}" in streamed.headers["warning"]
