"""Bodies of OpenAI's chat completions and completions → conversations and options of the engine."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from edge_runtime.generation.sampling import MAX_SEED
from edge_runtime.inputs.messages import parse_messages
from edge_runtime.server.anthropic.requests import MessagesRequest
from edge_runtime.server.errors import RequestError
from edge_runtime.server.fields.thinking import THINKING_LEVELS
from edge_runtime.server.openai.requests import ChatCompletionRequest, CompletionRequest
from server.openai_bodies import FLAT_TOOL, HI, SCHEMA, TOOL, chat, responses


def test_a_conversation_with_calls_and_reasoning():
    request = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": None,
                "reasoning": "They ask.",
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        ]
    )
    system, user, assistant, tool = parse_messages(request.conversation())
    assert (system.role, system.parts) == ("system", ("Be brief.",))
    assert user.parts == ("Weather?",)
    assert (assistant.reasoning, assistant.tool_calls[0]["function"]) == (
        "They ask.",
        {"name": "weather", "arguments": '{"city": "Rome"}'},
    )
    assert (tool.role, tool.parts) == ("tool", ("sunny",))


@pytest.mark.parametrize(
    "call", [{}, {"function": None}, {"function": {"name": 5}}, {"function": {"name": "f"} | {"arguments": 5}}]
)
def test_a_call_of_the_wrong_form_is_named(call):
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(RequestError) as error:
        chat(messages=messages).conversation()
    assert error.value.param == "messages[0].tool_calls[0]"


def test_options_of_a_chat():
    request = chat(
        max_tokens=5,
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        seed=-1,
        stop="END",
        n=2,
        logprobs=True,
        top_logprobs=3,
        logit_bias={"17": -100},
        presence_penalty=0.5,
        frequency_penalty=0.25,
        max_slices=1,
        thinking_budget=9,
        unheard_of={"a": 1},
    )
    assert request.options() == {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 0,
        "seed": MAX_SEED - 1,
        "stop": ["END"],
        "logprobs": True,
        "top_logprobs": 3,
        "logit_bias": {"17": -100},
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "max_slices": 1,
        "thinking": False,
        "thinking_budget": 9,
    }
    assert chat(max_tokens=-1).options() == {"thinking": False}, "as many as there are"


def test_null_is_as_good_as_nothing():
    """Clients that know all fields write those they do not use as null."""
    for asked in (chat(), CompletionRequest(prompt="a"), responses(), MessagesRequest(max_tokens=1, messages=[HI])):
        nulls = {name: None for name, field in type(asked).model_fields.items() if not field.is_required()}
        again = type(asked).model_validate({**asked.model_dump(exclude_unset=True), **nulls})
        assert again.options() == asked.options()
        assert not again.stream


@pytest.mark.parametrize(
    ("fields", "thinking", "budget"),
    [
        ({}, False, None),
        ({"reasoning_effort": "none"}, False, None),
        ({"reasoning_effort": "minimal"}, False, None),
        ({"reasoning_effort": "low"}, True, THINKING_LEVELS["low"]),
        ({"reasoning_effort": "low", "thinking_budget": 0}, True, 0),
        ({"reasoning_effort": "high", "thinking_token_budget": 0}, True, 0),
        ({"think": True, "thinking_budget_tokens": 0}, True, 0),
        ({"think": "low", "thinking_budget": 0}, True, 0),
        ({"enable_thinking": True, "thinking_budget": 0}, True, 0),
        ({"reasoning_effort": "high"}, True, None),
        ({"reasoning": {"effort": "medium"}}, True, THINKING_LEVELS["medium"]),
        ({"reasoning": {"effort": "high"}, "reasoning_effort": "none"}, False, None),
        ({"reasoning_effort": "max"}, True, None),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True, None),
        ({"chat_template_kwargs": {"enable_thinking": True}, "thinking_budget": 7}, True, 7),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}, False, None),
        ({"chat_template_kwargs": {}, "reasoning_effort": "high"}, True, None),
    ],
)
def test_reasoning_is_switched_and_limited(fields, thinking, budget):
    options = chat(**fields).options()
    assert (options["thinking"], options.get("thinking_budget")) == (thinking, budget)


def test_a_switch_of_the_wrong_type_is_named():
    with pytest.raises(RequestError) as error:
        chat(chat_template_kwargs={"enable_thinking": "yes"}).options()
    assert error.value.param == "chat_template_kwargs.enable_thinking"


@pytest.mark.parametrize(
    ("wanted", "options"),
    [
        ({"type": "text"}, {}),
        ({"type": "json_object"}, {"json": True}),
        ({"type": "json_object", "schema": SCHEMA}, {"schema": SCHEMA}),
        ({"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}}, {"schema": SCHEMA}),
    ],
)
def test_the_form_of_an_answer(wanted, options):
    found = chat(response_format=wanted).options()
    assert {key: found[key] for key in ("json", "schema") if key in found} == options


def test_a_form_without_schema_is_refused():
    for wanted in ({"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "a"}}):
        with pytest.raises(RequestError, match="no schema"):
            chat(response_format=wanted).options()
    with pytest.raises(RequestError, match="no schema"):
        responses(text={"format": {"type": "json_schema", "name": "a"}}).options()


OTHER = {"type": "function", "function": {"name": "other"}}


@pytest.mark.parametrize(
    ("choice", "names", "found"),
    [
        (None, ["weather", "other"], None),
        ("auto", ["weather", "other"], "auto"),
        ("none", ["weather", "other"], "none"),
        ("required", ["weather", "other"], "required"),
        ({"type": "function", "function": {"name": "other"}}, ["weather", "other"], "other"),
        ({"type": "function", "name": "other"}, ["weather", "other"], "other"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [OTHER]}},
            ["other"],
            "required",
        ),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "other"}]},
            ["other"],
            "auto",
        ),
    ],
)
def test_the_choice_of_tools(choice, names, found):
    options = chat(tools=[TOOL, OTHER], tool_choice=choice).options()
    assert ([tool["function"]["name"] for tool in options["tools"]], options.get("tool_choice")) == (names, found)
    assert options["tools"][0] in (TOOL, OTHER), "word by word, for the model reads them"


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"type": "function"},
        {"type": "custom", "name": "a"},
        {"type": "allowed_tools", "allowed_tools": 5},
        {"type": "allowed_tools", "tools": [{"name": "unknown"}]},
    ],
)
def test_other_choices_are_refused(choice):
    with pytest.raises(RequestError) as error:
        chat(tools=[TOOL], tool_choice=choice).options()
    assert error.value.param == "tool_choice"


def test_tools_that_are_no_functions_are_refused():
    for tool in ({"type": "custom", "custom": {}}, {"type": "function"}):
        with pytest.raises(RequestError) as error:
            chat(tools=[TOOL, tool]).options()
        assert error.value.param == "tools[1]"
    for tool in ({"type": "custom"}, {"type": "function"}, {"type": "function", "name": "a", "parameters": 5}):
        with pytest.raises(RequestError) as error:
            responses(tools=[FLAT_TOOL, tool]).options()
        assert error.value.param == "tools[1]"
    with pytest.raises(RequestError, match="older form"):
        chat(functions=[{"name": "weather"}]).all_warnings()


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": "Hi"},
        {"messages": [{"role": "robot", "content": "Hi"}]},
        {"messages": [{"content": "Hi"}]},
        {"n": 0},
        {"temperature": -1},
        {"temperature": "warm"},
        {"max_tokens": -2},
        {"top_logprobs": 21},
        {"stop": ["a"] * 65},
        {"reasoning_effort": "enormous"},
        {"response_format": {"type": "xml"}},
        {"logit_bias": {"1": "much"}},
    ],
)
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(ValidationError):
        chat(**fields)


def test_completions():
    request = CompletionRequest.model_validate(
        {"model": "m", "prompt": ["a", "b"], "logprobs": 0, "best_of": 1, "max_tokens": 4, "stop": None}
    )
    assert request.prompts == ["a", "b"]
    assert request.options() == {"raw": True, "max_tokens": 4, "logprobs": True, "top_logprobs": 0}
    for fields in ({"suffix": "end"}, {"best_of": 3}):
        with pytest.raises(RequestError) as error:
            CompletionRequest.model_validate({"prompt": "a", **fields}).options()
        assert error.value.param in fields


@pytest.mark.parametrize(
    "fields",
    [{"top_logprobs": False}, {"temperature": "1"}, {"n": True}, {"stream": 1}, {"logprobs": "true"}, {"seed": "3"}],
)
def test_nothing_is_turned_into_a_number_or_a_truth_value(fields):
    with pytest.raises(ValidationError, match=r"expected (a number|true or false)"):
        ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "a"}], **fields})


def test_whole_numbers_may_have_a_point():
    request = ChatCompletionRequest.model_validate(
        {"messages": [{"role": "user", "content": "a"}], "n": 2.0, "temperature": 1, "stream": None}
    )
    assert (request.n, request.temperature, request.stream) == (2, 1.0, None)
