"""Bodies of OpenAI's requests → conversations and options of the engine."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from pydantic import ValidationError

from edge_runtime.messages import ImagePart, parse_messages
from edge_runtime.sampling import MAX_SEED
from edge_runtime.server.anthropic_requests import MessagesRequest
from edge_runtime.server.errors import RequestError
from edge_runtime.server.ollama_options import THINKING_LEVELS
from edge_runtime.server.openai_requests import ChatCompletionRequest, CompletionRequest
from edge_runtime.server.responses_requests import ResponsesRequest

URI = "data:image/png;base64," + base64.b64encode(b"picture").decode()
TOOL = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": {"type": "object"}}}
FLAT_TOOL = {"type": "function", "name": "weather", "description": "Now.", "parameters": {"type": "object"}}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}


HI = {"role": "user", "content": "Hi"}


def chat(content: Any = "Hi", **fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": content}], **fields}
    )


def responses(given: Any = "Hi", **fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"model": "m", "input": given, **fields})


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": URI}},
        {"type": "image_url", "image_url": URI},
        {"type": "input_image", "image_url": URI},
        {"type": "input_image", "image_url": {"url": URI}},
    ],
)
def test_a_picture_in_every_spelling(part):
    """Chat completions and responses write it differently, and clients mix them up."""
    question = {"type": "text", "text": "What is it?"}
    (message,) = parse_messages(chat([part, question]).conversation())
    assert [*message.parts] == [ImagePart(URI), "What is it?"]
    item = {"role": "user", "content": [part, {"type": "input_text", "text": "What is it?"}]}
    assert parse_messages(responses([item]).conversation_messages()) == [message]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "/etc/passwd"}},
        {"type": "image_url", "image_url": "file:///etc/passwd"},
        {"type": "image_url", "image_url": None},
        {"type": "image_url"},
        {"type": "image", "image": "/etc/passwd"},
        {"image": "/etc/passwd"},
        {"type": "input_image", "file_id": "file-1"},
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "file", "file": "report.pdf"},
        {"type": "input_file", "file_data": "report.pdf"},
        {"type": "video_url", "video_url": {"url": "clip.mp4"}},
        {"type": "video", "video": "clip.mp4"},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": ["text"], "text": "Hi"},
        {"type": "text", "text": 5},
        7,
        None,
    ],
)
def test_no_string_of_a_client_becomes_a_path(part):
    with pytest.raises(RequestError) as error:
        chat(["ok", part]).conversation()
    assert error.value.param.startswith("messages[0].content[1]")
    with pytest.raises(RequestError) as error:
        responses([{"role": "user", "content": [part]}]).conversation_messages()
    assert error.value.param.startswith("input[0].content[0]")


def test_documents_and_videos_are_passed_on():
    data = "JVBERi0xLjcKJeLjz9MK"
    pdf, clip = f"data:application/pdf;base64,{data}", "data:video/mp4;base64,AAAA"
    parts = [
        {"type": "file", "file": {"file_data": pdf, "filename": "a.pdf"}},
        {"type": "input_file", "file_data": pdf, "filename": "a.pdf"},
        {"type": "video_url", "video_url": {"url": clip}},
        {"type": "input_video", "video_url": clip},
        {"type": "file", "file": {"file_data": data}, "pages": "1-3", "dpi": 90, "path": "/etc/passwd"},
        {"type": "video_url", "video_url": {"url": clip}, "fps": 2, "packing": 6, "video": "/etc/passwd"},
    ]
    (message,) = chat(parts).conversation()
    file = {"type": "file", "file": {"file_data": pdf, "filename": "a.pdf"}}
    video = {"type": "video_url", "video_url": {"url": clip}}
    assert message["content"] == [
        file,
        file,
        video,
        video,
        {"type": "file", "file": {"file_data": pdf}, "pages": "1-3", "dpi": 90},
        video | {"fps": 2, "packing": 6},
    ]


def test_the_detail_of_a_picture_limits_its_slices():
    parts = [
        {"type": "image_url", "image_url": {"url": URI, "detail": "low"}},
        {"type": "input_image", "image_url": URI, "detail": "low"},
        {"type": "image_url", "image_url": {"url": URI, "detail": "high"}},
        {"type": "image_url", "image_url": {"url": URI}, "max_slices": 4},
    ]
    (message,) = chat(parts).conversation()
    assert [part.get("max_slices") for part in message["content"]] == [1, 1, None, 4]


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


def test_items_of_a_responses_request_become_messages():
    request = responses(
        [
            {"role": "user", "content": "Weather?"},
            {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "function_call", "call_id": "1", "name": "weather", "arguments": '{"city": "Rome"}'},
            {"type": "function_call", "call_id": "2", "name": "other", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "sunny"},
            {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "yes"}]},
            {"type": "reasoning", "id": "rs2", "summary": [{"type": "summary_text", "text": "So."}]},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Sunny.", "annotations": []}],
            },
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Thanks"}]},
        ],
        instructions="Be brief.",
    )
    messages = request.conversation_messages()
    roles = ["system", "user", "assistant", "tool", "tool", "assistant", "user"]
    assert [message["role"] for message in messages] == roles
    assert messages[2]["reasoning_content"] == "Hm."
    assert [call["function"]["name"] for call in messages[2]["tool_calls"]] == ["weather", "other"]
    assert messages[5]["reasoning_content"] == "So."
    assert len(parse_messages(messages)) == 7


@pytest.mark.parametrize(
    "item",
    [
        {},
        {"type": "item_reference", "id": "a"},
        {"type": "web_search_call"},
        {"role": "tool", "content": "a"},
        {"type": "function_call", "arguments": "{}"},
        {"type": "function_call", "name": "a", "arguments": {}},
        {"type": "function_call_output", "output": 5},
        {"type": "reasoning", "content": "Hm."},
        {"type": ["message"]},
    ],
)
def test_items_that_cannot_be_used_are_named(item):
    with pytest.raises(RequestError) as error:
        responses([{"role": "user", "content": "Hi"}, item]).conversation_messages()
    assert error.value.param.startswith("input[1]")


@pytest.mark.parametrize("field", ["conversation", "prompt", "background"])
def test_what_needs_a_memory_is_refused(field):
    value = True if field == "background" else "id_1"
    with pytest.raises(RequestError) as error:
        responses(**{field: value}).conversation_messages()
    assert error.value.param == field


def test_options_of_a_responses_request():
    request = responses(
        max_output_tokens=9,
        tools=[FLAT_TOOL],
        tool_choice={"type": "function", "name": "weather"},
        reasoning={"effort": "high"},
        include=["message.output_text.logprobs"],
        truncation="auto",
        text={"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
    )
    assert request.options() == {
        "max_tokens": 9,
        "tools": [TOOL],
        "tool_choice": "weather",
        "thinking": True,
        "logprobs": True,
        "context_shift": True,
        "schema": SCHEMA,
    }
    assert responses(top_logprobs=2).options() == {"thinking": False, "logprobs": True, "top_logprobs": 2}


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


@pytest.mark.parametrize("key", ["image_url", "input_image", "video_url"])
def test_base64_alone_becomes_a_data_uri(key):
    """Clients leave the prefix off, wrap lines and write `DATA:`; a path or a name of something stays refused."""
    name = "video_url" if key == "video_url" else "image_url"
    text = base64.b64encode(bytes(range(64))).decode()
    for sent in (text, "\r\n".join([text[:76], text[76:]]), text.rstrip("=")):
        (message,) = chat([{"type": key, name: {"url": sent}}]).conversation()
        assert message["content"][0][name]["url"] == f"data:application/octet-stream;base64,{sent}"
    uri = f"DATA:image/png;base64,{text}"
    (message,) = chat([{"type": key, name: {"url": uri}}]).conversation()
    assert message["content"][0][name]["url"] == uri
    for path in ("/etc/passwd", "picture.png", "folder/folder/folder/picture.png", "file-1"):
        with pytest.raises(RequestError, match="expected a data: URI"):
            chat([{"type": key, name: {"url": path}}]).conversation()
