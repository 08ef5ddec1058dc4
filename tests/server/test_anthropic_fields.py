"""Every field and block that Anthropic's clients know is decided: kept, passed over, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_type_hints

import anthropic
import anthropic.types.beta
import pytest
import typing_extensions
from anthropic.types import beta, message_count_tokens_params, message_create_params
from anthropic.types.beta import message_count_tokens_params as beta_count_params
from anthropic.types.beta import message_create_params as beta_create_params

from edge_runtime.inputs.messages import ImagePart, parse_messages
from edge_runtime.server.anthropic import blocks, requests
from edge_runtime.server.anthropic.requests import CountRequest, MessagesRequest
from edge_runtime.server.anthropic.schemas import as_meant
from edge_runtime.server.errors import RequestError
from server.asked import ANTHROPIC_TOOL as TOOL
from server.asked import BLOCK as IMAGE
from server.test_anthropic_translation import asked

CREATE = (
    message_create_params.MessageCreateParamsNonStreaming,
    beta_create_params.MessageCreateParamsNonStreaming,
)
COUNT = (message_count_tokens_params.MessageCountTokensParams, beta_count_params.MessageCountTokensParams)
HINTS = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["b"]}}, "required": ["a"], "additionalProperties": False}
FORM = {"type": "json_schema", "schema": SCHEMA}


def fields_of(*kinds: Any) -> set[str]:
    return {name for kind in kinds for name in get_type_hints(kind)}


@pytest.mark.parametrize(("kinds", "body"), [(CREATE, MessagesRequest), (COUNT, CountRequest)])
def test_every_field_of_a_request_is_decided_once(kinds, body):
    kept, passed_over, refused = {*body.model_fields}, {*requests.PASSED_OVER}, {*requests.REFUSED}
    assert fields_of(*kinds) <= kept | passed_over | refused
    assert len(kept | passed_over | refused) == len(kept) + len(passed_over) + len(refused)


def test_every_field_of_parts_is_decided():
    parts = {
        requests.OutputConfig: (anthropic.types.OutputConfigParam, {"format", "effort"}),
        requests.Thinking: (anthropic.types.ThinkingConfigEnabledParam, {"type", "budget_tokens", "display"}),
        requests.ToolChoice: (anthropic.types.ToolChoiceToolParam, {"type", "name", "disable_parallel_tool_use"}),
        requests.ContextManagement: (beta.BetaContextManagementConfigParam, {"edits"}),
    }
    for kept, (theirs, names) in parts.items():
        assert fields_of(theirs) == names <= {*kept.model_fields}
    tool = {*requests.AnthropicTool.model_fields}
    assert fields_of(anthropic.types.ToolParam, beta.BetaToolParam) <= tool | requests.TOOL_PASSED_OVER


@pytest.mark.parametrize("name", requests.PASSED_OVER)
def test_fields_that_change_no_answer_are_passed_over(name):
    for value in ("x", {"type": "x"}, ["x"], None):
        request = asked(**{name: value})
        assert request.conversation() == HINTS
        assert request.options() == asked().options()


@pytest.mark.parametrize("name", requests.REFUSED)
def test_fields_that_would_change_the_answer_are_refused_by_name(name):
    with pytest.raises(RequestError, match=name) as error:
        asked(**{name: {"type": "x"}}).conversation()
    assert error.value.param == name
    for nothing in (None, [], {}):
        assert asked(**{name: nothing}).conversation() == HINTS


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        # Words of other APIs, which bind an answer there.
        *(
            ({name: "x"}, name)
            for name in ("grammar", "guided_json", "guided_choice", "json_schema", "response_format")
        ),
        *(({name: 5}, name) for name in ("n_predict", "n", "seed", "max_completion_tokens", "stop", "prefix")),
        ({"output_config": {"task_budget": {"type": "tokens", "total": 5}}}, "output_config.task_budget"),
        ({"output_config": {"format": {**FORM, "strict": True}}}, "output_config.format.strict"),
        ({"output_format": FORM, "output_config": {"format": FORM}}, "output_format"),
        ({"output_config": {"effort": "low"}, "thinking": {"type": "disabled"}}, "output_config.effort"),
        ({"thinking": {"type": "enabled", "depth": 5}}, "thinking.depth"),
        ({"tool_choice": {"type": "auto", "names": ["x"]}}, "tool_choice.names"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits"),
        ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "context_management.edits"),
        ({"context_management": {"more": 1}}, "context_management.more"),
        ({"tools": [TOOL | {"must": "be called"}]}, "tools[0].must"),
        ({"tools": [TOOL | {"allowed_callers": ["code_execution_20250825"]}]}, "tools[0].allowed_callers"),
        ({"tool_choice": {"type": "any"}}, "tools"),
        ({"tool_choice": {"type": "any"}, "tools": []}, "tools"),
        ({"tool_choice": {"type": "tool", "name": "rain"}, "tools": [TOOL]}, "tool_choice.name"),
        ({"stop_sequences": ["a", ""]}, "stop_sequences"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(fields, name):
    request = asked(**fields)

    def translated() -> None:
        request.conversation()
        request.options()

    with pytest.raises(RequestError) as error:
        translated()
    assert error.value.param == name
    assert name.split(".")[-1].split("[")[0] in str(error.value)


@pytest.mark.parametrize("fields", [{"output_config": {"effort": "some"}}, {"thinking": {"type": "between_tools"}}])
def test_values_that_are_none_are_refused(fields):
    with pytest.raises(ValueError, match="Input should be"):
        asked(**fields)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"output_config": {"format": FORM}}, {"schema": SCHEMA}),
        ({"output_format": FORM}, {"schema": SCHEMA}),
        ({"output_config": {"format": None}, "output_format": None}, {}),
        ({"output_config": {"effort": "low"}}, {"thinking": True, "thinking_budget": 256}),
        ({"output_config": {"effort": "max"}}, {"thinking": True}),
        (
            {"output_config": {"effort": "medium"}, "thinking": {"type": "adaptive"}},
            {"thinking": True, "thinking_budget": 1024},
        ),
        (
            {"output_config": {"effort": "medium"}, "thinking": {"type": "enabled", "budget_tokens": 99}},
            {"thinking": True, "thinking_budget": 99},
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, {"thinking": True, "thinking_budget": 0}),
        (
            {"output_config": {"effort": "low"}, "thinking": {"type": "enabled", "budget_tokens": 0}},
            {"thinking": True, "thinking_budget": 0},
        ),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, {"thinking": True}),
        ({"stop_sequences": [" ", "\n\n"]}, {"stop": [" ", "\n\n"]}),
        ({"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}}, {}),
    ],
)
def test_what_is_asked_of_an_answer_reaches_the_engine(fields, options):
    request = asked(**fields)
    assert request.conversation() == HINTS
    assert request.options() == {"max_tokens": 9, "thinking": False} | options


def test_an_answer_of_no_tokens_is_the_prompt_alone():
    options = asked(max_tokens=0).options()
    assert (options["prompt_only"], "max_tokens" in options) == (True, False)


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ({"type": "integer", "description": "{maximum: 9, minimum: -1}"}, {"maximum": 9, "minimum": -1}),
        ({"type": "string", "description": "A name.\n\n{maxLength: 5}"}, {"maxLength": 5}),
        ({"type": "number", "description": "{exclusiveMinimum: 0.5}"}, {"exclusiveMinimum": 0.5}),
        ({"type": "number", "description": "{multipleOf: 1e-3}"}, {"multipleOf": 0.001}),
        ({"type": "string", "description": "{pattern: ^[a, b]: 5$, minLength: 2}"}, {"minLength": 2}),
        ({"type": "integer", "maximum": 5, "description": "{maximum: 9}"}, {}),
        ({"type": "integer", "description": "{default: None}"}, {}),
        ({"type": "integer", "description": "Between {minimum: 1} and more"}, {}),
        ({"enum": ["a"], "description": "{minLength: 2}"}, {}),
    ],
)
def test_limits_that_the_packages_move_into_descriptions_are_kept(sent, meant):
    assert as_meant(sent) == sent | meant
    assert as_meant({"items": sent}) == {"items": sent | meant}
    for key in ("properties", "$defs"):
        assert as_meant({key: {"description": sent}}) == {key: {"description": sent | meant}}
    assert as_meant({"anyOf": [sent, {"type": "null"}]}) == {"anyOf": [sent | meant, {"type": "null"}]}
    assert as_meant({"const": sent, "enum": [sent]}) == {"const": sent, "enum": [sent]}


def test_a_tool_that_waits_is_told_of_once_it_is_named():
    tools = [TOOL, TOOL | {"name": "later", "defer_loading": True}]
    assert [tool["function"]["name"] for tool in asked(tools=tools).options()["tools"]] == ["weather"]
    found = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "tool_reference", "tool_name": "later"}]}
    named = asked([found, {"type": "text", "text": "Go on."}], tools=tools)
    assert [tool["function"]["name"] for tool in named.options()["tools"]] == ["weather", "later"]
    assert named.conversation()[0] == {"role": "tool", "content": [{"type": "text", "text": "Tool: later"}]}
    chosen = asked(tools=tools, tool_choice={"type": "tool", "name": "later"})
    assert chosen.options()["tool_choice"] == "later"


def test_examples_of_a_tool_are_told():
    tool = TOOL | {"description": "The weather.", "input_examples": [{"city": "Örebro"}]}
    (told,) = asked(tools=[tool]).options()["tools"]
    assert told["function"]["description"] == 'The weather.\nExamples:\n{"city": "Örebro"}'


# --- blocks --------------------------------------------------------------------------------------------------------


def kinds_in(union: Any) -> Iterator[str]:
    """What `type` may be in a union of typed dictionaries and models."""
    for kind in get_args(union):
        if typing_extensions.is_typeddict(kind):
            yield from literals(get_type_hints(kind)["type"])
        elif isinstance(kind, type):
            yield from literals(kind.model_fields["type"].annotation)
        else:
            yield from kinds_in(kind)


def literals(hint: Any) -> list[str]:
    """Values of a `Literal`, whatever stands around it."""
    return [hint] if isinstance(hint, str) else [value for part in get_args(hint) for value in literals(part)]


def test_every_block_is_decided_once():
    unions = (
        anthropic.types.ContentBlockParam,
        beta.BetaContentBlockParam,
        anthropic.types.tool_result_block_param.Content,
        beta.beta_tool_result_block_param.Content,
    )
    known = {kind for union in unions for kind in kinds_in(union)}
    assert {"text", "tool_use", "tool_reference", "compaction", "server_tool_use"} <= known
    decided = [*blocks.READ, *blocks.TURN, *blocks.PASSED_OVER, *blocks.REFUSED]
    assert known <= {*decided}
    assert len({*decided}) == len(decided)


@pytest.mark.parametrize("kind", blocks.REFUSED)
def test_blocks_that_cannot_be_read_are_refused_by_name(kind):
    for content in ([{"type": kind}], [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": kind}]}]):
        with pytest.raises(RequestError, match=kind):
            asked(content).conversation()


@pytest.mark.parametrize("kind", blocks.PASSED_OVER)
def test_blocks_that_say_nothing_are_passed_over(kind):
    said = [{"type": kind, "data": "x"}, {"type": "text", "text": "Hi"}]
    assert asked(said).conversation()[0]["content"] == [{"type": "text", "text": "Hi"}]


def texts(content: Any) -> list[Any]:
    """Texts of a user's message as the model is shown it; a picture is a picture."""
    (message,) = parse_messages(asked(content).conversation())
    return ["picture" if isinstance(part, ImagePart) else part for part in message.parts]


def document(source: Mapping[str, Any], **more: Any) -> list[dict[str, Any]]:
    return [{"type": "document", "source": source, **more}]


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (document({"type": "text", "media_type": "text/plain", "data": "Hello"}), ["Hello"]),
        (document({"type": "content", "content": "Hello"}), ["Hello"]),
        (document({"type": "content", "content": [{"type": "text", "text": "Hello"}, IMAGE]}), ["Hello", "picture"]),
        (
            document({"type": "content", "content": "Hello"}, title="A letter", context="From Rome."),
            ["A letter", "From Rome.", "Hello"],
        ),
        (document({"type": "base64", "media_type": "application/pdf", "data": "JVBERg=="}), ["picture"]),
        (document({"type": "base64", "data": "JVBERg=="}, title="A"), ["A", "picture"]),
        (
            [{"type": "search_result", "title": "T", "source": "S", "content": [{"type": "text", "text": "C"}]}],
            ["Search result: T (S)", "C"],
        ),
        ([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "citations": None}], ["a"]),
        ([IMAGE | {"transformations": {"oversized_image": "downsize"}}], ["picture"]),
    ],
)
def test_documents_and_results_are_shown(content, shown):
    assert texts(content) == shown


@pytest.mark.parametrize(
    ("block", "place"),
    [
        (*document({"type": "file", "file_id": "file_1"}), "source.type"),
        ({"type": "image", "source": {"type": "file", "file_id": "file_1"}}, "source.type"),
        (*document({"type": "content", "content": 5}), "source.content"),
        (*document({"type": "content", "content": [{"type": "audio"}]}), "source.content[0].type"),
        (*document({"type": "text", "data": "a"}, citations={"enabled": True}), "citations"),
        (
            {"type": "search_result", "title": "T", "source": "S", "content": [], "citations": {"enabled": True}},
            "citations",
        ),
        ({"type": "search_result", "title": "T", "content": []}, "source"),
        ({"type": "tool_reference"}, "tool_name"),
        (IMAGE | {"transformations": {"oversized_image": "error"}}, "transformations.oversized_image"),
    ],
)
def test_what_is_wrong_with_a_block_is_named(block, place):
    with pytest.raises(RequestError) as error:
        asked([block]).conversation()
    assert error.value.param == f"messages[0].content[0].{place}"


def called(number: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": number, "name": "weather", "input": {"number": number}}


def result(number: str, **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": number, "content": f"result {number}", **fields}


def test_results_stand_as_their_calls_do():
    """The model is not shown whose result it is."""
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [called("1")]},
        {"role": "assistant", "content": [called("2"), called("3")]},
        {"role": "user", "content": [result("3"), result("1")]},
        {"role": "user", "content": [result("2"), {"type": "text", "text": "So?"}]},
    ]
    user, assistant, *results, last = asked(messages=turns).conversation()
    assert [call["function"]["arguments"]["number"] for call in assistant["tool_calls"]] == ["1", "2", "3"]
    assert [item["content"] for item in results] == ["result 1", "result 2", "result 3"]
    assert last["content"] == [{"type": "text", "text": "So?"}]
    parse_messages([user, assistant, *results, last])


def test_neighbours_of_one_role_are_one_turn():
    turns = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, IMAGE]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    first, second, third = parse_messages(asked(messages=turns).conversation())
    assert first.parts[:2] == ("a", "b")
    assert (second.reasoning, second.parts) == ("Hm.", ("c",))
    assert third.parts == ("d",)


def test_a_call_that_failed_is_told_as_one():
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [called("1"), called("2")]},
        {"role": "user", "content": [result("1", is_error=True), {**result("2", is_error=True), "content": None}]},
    ]
    *_, first, second = parse_messages(asked(messages=turns).conversation())
    assert first.parts == ("The call failed:", "result 1")
    assert second.parts == ("The call failed.",)


def test_results_hold_pictures_and_documents():
    content = [{"type": "text", "text": "Here:"}, IMAGE, *document({"type": "text", "data": "page"})]
    (message,) = parse_messages(asked([{**result("1"), "content": content}]).conversation())
    assert message.role == "tool"
    assert [isinstance(part, ImagePart) or part for part in message.parts] == ["Here:", True, "page"]


# --- the beginning of an answer ------------------------------------------------------------------------------------


def begun(content: Any, **fields: Any) -> MessagesRequest:
    return asked(messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}], **fields)


def test_a_beginning_is_kept():
    assert begun("The answer is (").conversation()[-1] == {"role": "assistant", "content": "The answer is ("}
    for nothing in ("", []):
        assert begun(nothing).conversation() == HINTS


@pytest.mark.parametrize(
    ("content", "fields", "place"),
    [
        ("The answer is ", {}, "messages"),
        ("The answer is\n", {}, "messages"),
        ([{"type": "text", "text": "a "}], {}, "messages"),
        ([{"type": "text", "text": "a"}, called("1")], {}, "messages"),
        ("The", {"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking"),
        ("The", {"thinking": {"type": "adaptive"}}, "thinking"),
        ("The", {"output_config": {"effort": "high"}}, "output_config.effort"),
    ],
)
def test_a_beginning_that_cannot_be_gone_on_with_is_refused(content, fields, place):
    with pytest.raises(RequestError) as error:
        begun(content, **fields).conversation()
    assert error.value.param == place
