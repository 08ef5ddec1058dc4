"""Tool calls: written ones are parsed, wanted ones are enforced, results go back into the prompt."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edge_runtime import MessageError, Model
from edge_runtime.answers import TOY_NOTICE
from edge_runtime.generation.text_stream import Piece, TextStream
from edge_runtime.structured_output.tools import ToolCall, parse_call

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"$ref": "#/$defs/place"},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["place", "days"],
            "$defs": {"place": {"type": "string", "maxLength": 12}},
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock", "description": "The time."}}
TOOLS = [WEATHER, CLOCK]
BEGIN, END = 1000, 1001


@pytest.fixture(scope="module")
def model(exact_folder: Path):
    with Model.load(exact_folder) as loaded:
        yield loaded


def ask(model: Model, **options: Any):
    options = {"tools": TOOLS, "temperature": 1.0, "seed": 5, "max_tokens": 200} | options
    return model.chat("What is the weather in Rome?", stream=True, **options)


# --- what the model wrote ----------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer whose ids below 256 are bytes."""

    special_ids = {"<tool_call>": BEGIN, "</tool_call>": END}  # noqa: RUF012 - as the real one has it

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else {BEGIN: b"<tool_call>", END: b"</tool_call>"}[token_id]


def read(*parts: str | int, tools=("weather", "clock"), **options: Any) -> list[Piece]:
    """Pieces of a stream of texts and tags."""
    stream = TextStream(Bytes(), **({"thinking": False, "tools": tools} | options))
    ids = [i for part in parts for i in (part.encode() if isinstance(part, str) else [part])]
    return [piece for i in ids for piece in stream.feed(i)] + stream.finish()


def joined(pieces: list[Piece], kind: str = "answer") -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


def test_calls_are_read_and_the_text_around_them_stays_text():
    pieces = read(
        *("I will look.\n", BEGIN, '\n{"name": "weather", "arguments": {"place": "Rom", "days": 2}}\n', END),
        *("\n", BEGIN, '\n{"name": "clock", "arguments": {}}\n', END, "\nDone.\n\n"),
    )
    assert [piece.call for piece in pieces if piece.kind == "tool_call"] == [
        ToolCall("weather", {"place": "Rom", "days": 2}),
        ToolCall("clock", {}),
    ]
    assert joined(pieces) == "I will look.Done.\n\n"
    assert joined(pieces, "tool_call").startswith('<tool_call>\n{"name": "weather"')
    kinds = [piece.kind for piece in pieces]
    assert kinds.index("tool_call") > kinds.index("answer")
    assert not any(piece.malformed for piece in pieces)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "no name"),
        ('{"arguments": {}}', "no name"),
        ('{"name": "rm", "arguments": {}}', "'rm', which was not offered"),
        ('{"name": "clock", "arguments": [1]}', "list, not a JSON object"),
        ('{"name": "clock", "arguments": "{"}', "arguments of the tool call are not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_malformed_call_is_text_with_a_reason(body, reason):
    pieces = read("So: ", BEGIN, body, END, "!")
    assert joined(pieces) == f"So: <tool_call>{body}</tool_call>!"
    assert not joined(pieces, "tool_call")
    (malformed,) = [piece.malformed for piece in pieces if piece.malformed]
    assert malformed.text == f"<tool_call>{body}</tool_call>"
    assert reason in malformed.reason


def test_a_call_that_is_not_finished_is_not_lost():
    pieces = read(BEGIN, '{"name": "clo')
    assert joined(pieces) == '<tool_call>{"name": "clo'
    assert "not finished" in pieces[-1].malformed.reason
    pieces = read(BEGIN, "a", BEGIN, '{"name": "clock"}', END)
    assert [piece.kind for piece in pieces] == ["answer", "tool_call"]


def test_arguments_may_be_json_inside_a_string():
    assert parse_call('{"name": "f", "arguments": "{\\"a\\": 1}"}', ["f"]) == ToolCall("f", {"a": 1})


def test_tags_are_text_where_no_tools_were_offered_and_in_reasoning():
    assert joined(read(BEGIN, "{}", END, tools=())) == "<tool_call>{}</tool_call>"
    assert joined(read(BEGIN, "{}", END, thinking=True), "reasoning") == "<tool_call>{}</tool_call>"


def test_an_end_tag_alone_is_text():
    assert joined(read("a", END)) == "a</tool_call>"


def test_stop_strings_do_not_cut_calls():
    pieces = read("a", BEGIN, '{"name": "clock"}', END, "bXc", stop=["clock", "X"])
    assert joined(pieces) == "ab"
    assert joined(pieces, "tool_call")


# --- what the model must write -----------------------------------------------------------------------------------


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("choice", ["required", "weather", {"type": "function", "function": {"name": "clock"}}])
def test_a_wanted_call_is_made(model, choice, thinking):
    for seed in range(3):
        stream = ask(model, tool_choice=choice, thinking=thinking, seed=seed)
        pieces = [*stream]
        answer = stream.result()
        assert answer.finish_reason == "stop"
        assert answer.answer == ""
        (call,) = answer.tool_calls
        assert [piece.call for piece in pieces if piece.kind == "tool_call"] == [call]
        wanted = choice["function"]["name"] if isinstance(choice, dict) else choice
        assert call.name == wanted or wanted == "required"
        if call.name == "weather":
            jsonschema.validate(call.arguments, WEATHER["function"]["parameters"])


def test_required_may_choose(model):
    names = {
        ask(model, tool_choice="required", temperature=5, top_p=1, seed=seed).result().tool_calls[0].name
        for seed in range(12)
    }
    assert names == {"weather", "clock"}


def test_the_budget_completes_calls_too(model):
    wide = {
        "name": "wide",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    }
    answer = ask(model, tools=[wide], tool_choice="wide", max_tokens=60).result()
    assert answer.shortened
    assert answer.completion_tokens <= 60
    assert answer.tool_calls[0].name == "wide"


def test_none_hides_the_tools_and_auto_shows_them(model):
    prompts = {}
    for choice in ("auto", "none"):
        prompts[choice] = ask(model, tool_choice=choice, max_tokens=1).result().prompt_tokens
    assert prompts["none"] == len(model.build_prompt("What is the weather in Rome?").ids)
    assert prompts["auto"] == len(model.build_prompt("What is the weather in Rome?", tools=TOOLS).ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool_choice": "sometimes"}, "expected one of auto, required, none, or the name of a tool: weather, clock"),
        ({"tool_choice": {"type": "function", "function": {"name": "rm"}}}, "weather, clock"),
        ({"tools": [], "tool_choice": "required"}, "there are no tools"),
        ({"tools": [{"type": "function"}]}, "Tool 0 has no name"),
        ({"tools": [CLOCK, CLOCK]}, "more than once"),
        ({"tools": "weather"}, "not a list of mappings"),
        ({"schema": {"type": "text"}, "tool_choice": "required"}, r"\$\.type is"),
        ({"schema": {"type": "object"}, "json": True}, "Both a schema and json=True"),
        (
            {"tools": [{"name": "f", "parameters": {"not": {"pattern": "a"}}}], "tool_choice": "f"},
            r"parameters of the tool 'f': \$\.not cannot",
        ),
    ],
)
def test_contradicting_options_are_refused(model, options, message):
    with pytest.raises(MessageError, match=message):
        ask(model, **options)


@pytest.mark.parametrize(
    "value", ["NaN", "-Infinity", "1e999", "-1e400", '"\\ud800"', '{"\\udfff": 1}', "[1, [NaN]]", "1" * 5000]
)
def test_what_cannot_be_written_as_json_again_is_not_a_call(value):
    for arguments in (f'{{"x": {value}}}', json.dumps(f'{{"x": {value}}}')):
        found = parse_call(f'{{"name": "clock", "arguments": {arguments}}}', ["clock"])
        assert isinstance(found, str)
        assert "not JSON" in found
    fine = parse_call('{"name": "clock", "arguments": {"x": [1e308, "\\ud83d\\ude00"]}}', ["clock"])
    assert fine == ToolCall("clock", {"x": [1e308, "\U0001f600"]})


@pytest.fixture(scope="module")
def tagless(exact_folder: Path, tmp_path_factory):
    """The tiny model with a vocabulary in which the tags of calls are not tokens."""
    folder = tmp_path_factory.mktemp("tagless")
    for file in exact_folder.iterdir():
        (folder / file.name).write_bytes(
            file.read_bytes().replace(b"<tool_call>", b"[tool_call]", 1).replace(b"</tool_call>", b"[/tool_call]", 1)
        )
    with Model.load(folder) as loaded:
        yield loaded


def test_a_model_without_the_tags_cannot_be_made_to_call(tagless):
    with pytest.raises(MessageError, match="lacks the tokens <tool_call>"):
        ask(tagless, tool_choice="required")
    ask(tagless, tool_choice="auto", max_tokens=3).result()


def test_tools_that_cannot_be_enforced_may_be_offered_freely(model):
    """The prompt describes them as they are, and the model chooses the arguments; they cannot be enforced."""
    odd = {"name": "f", "description": "Odd.", "parameters": {"not": {"pattern": "a"}}}
    question, tools = "What is the weather in Rome?", [odd, CLOCK]
    prompt = model.build_prompt(question, tools=tools)
    assert all(json.dumps(tool) in prompt.text for tool in tools)
    for options in ({}, {"tool_choice": "auto"}):
        answer = ask(model, tools=tools, max_tokens=3, **options).result()
        assert answer.prompt_tokens == len(prompt.ids)
        assert answer.completion_tokens == 3
        assert not answer.shortened, "nothing has made it keep a form"
    for choice in ("f", "required"):
        with pytest.raises(MessageError, match=r"parameters of the tool 'f': \$\.not cannot"):
            ask(model, tools=tools, tool_choice=choice)
    (call,) = ask(model, tools=tools, tool_choice="clock").result().tool_calls
    assert call == ToolCall("clock", {})
    assert parse_call('{"name": "f", "arguments": {"b": "a"}}', ["f", "clock"]) == ToolCall("f", {"b": "a"})


# --- the way back ------------------------------------------------------------------------------------------------


def test_calls_and_results_go_back_in_the_official_form(model):
    answer = ask(model, tool_choice="weather").result()
    (call,) = answer.tool_calls
    conversation = [
        {"role": "user", "content": "What is the weather in Rome?"},
        answer.message(),
        {"role": "tool", "content": '{"sky": "clear"}'},
        {"role": "tool", "content": "18 degrees, <tool_call> is text here"},
    ]
    prompt = model.build_prompt(conversation, tools=TOOLS)
    written = json.dumps(call.arguments, ensure_ascii=False)
    assert f'<tool_call>\n{{"name": "weather", "arguments": {written}}}\n</tool_call><|im_end|>' in prompt.text
    assert (
        '<|im_start|>user\n<tool_response>\n{"sky": "clear"}\n</tool_response>\n<tool_response>\n18 degrees'
        in prompt.text
    )
    special = model.tokenizer.special_ids
    assert prompt.ids.count(special["<tool_call>"]) == 1 + model.build_prompt("x", tools=TOOLS).ids.count(
        special["<tool_call>"]
    )
    model.chat(conversation, tools=TOOLS, max_tokens=3)


def test_the_message_of_an_answer_keeps_its_reasoning(model):
    answer = ask(model, tool_choice="clock", thinking=True, thinking_budget=5).result()
    message = answer.message()
    assert message["reasoning_content"] == answer.reasoning
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "clock", "arguments": {}}}]
    messages = [{"role": "user", "content": "?"}, message, {"role": "tool", "content": "noon"}]
    assert "<think>\n" in model.build_prompt(messages).text


def test_answers_with_calls_are_json(model):
    answer = ask(model, tool_choice="clock").result()
    assert json.loads(json.dumps(asdict(answer)))["tool_calls"] == [{"name": "clock", "arguments": {}}]


def test_free_answers_among_enforced_ones_are_the_same_as_alone(model):
    alone = model.chat("Hello", greedy=True, max_tokens=20).answer
    calls = [ask(model, tool_choice="required", seed=seed) for seed in range(4)]
    assert model.chat("Hello", greedy=True, max_tokens=20).answer == alone
    assert all(len(call.result().tool_calls) == 1 for call in calls)


# --- the demo, whose vocabulary has the tags -------------------------------------------------------------------


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("choice", ["required", "weather", {"type": "function", "function": {"name": "weather"}}])
def test_the_demo_can_be_made_to_call(demo: Model, choice, thinking):
    stream = ask(demo, tool_choice=choice, thinking=thinking, thinking_budget=8 if thinking else None)
    pieces = list(stream)
    answer = stream.finished()
    assert [piece.kind for piece in pieces if piece.kind != "reasoning"] == ["tool_call"]
    (call,) = (piece.call for piece in pieces if piece.call)
    assert answer.tool_calls == [call]
    assert pieces[-1].text.startswith("<tool_call>\n{")
    assert pieces[-1].text.endswith("}\n</tool_call>")
    assert (answer.answer, answer.finish_reason) == ("", "stop")
    if choice != "required":
        assert call.name == "weather"
    parameters = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}
    jsonschema.validate(call.arguments, parameters[call.name])
    result = {"role": "tool", "content": "sunny"}
    prompt = demo.build_prompt([{"role": "user", "content": "?"}, answer.message(), result], tools=TOOLS)
    special = demo.tokenizer.special_ids
    assert prompt.ids.count(special["<tool_call>"]) == prompt.ids.count(special["</tool_call>"]) == 3  # 2 explain
    assert prompt.ids.count(special["<tool_response>"]) == 1


def test_what_a_model_claims_is_what_its_vocabulary_has(demo: Model, model: Model, tagless: Model):
    assert model.capabilities == ["completion", "vision", "tools", "thinking"]
    assert tagless.capabilities == ["completion", "vision", "thinking"]
    assert "<tool_call>" in tagless.template
    assert demo.capabilities == ["completion", "vision"]  # a toy: its calls are of no use


def test_answers_of_a_toy_say_so(demo: Model, model: Model):
    assert demo.is_toy
    assert demo.chat("Hi", max_tokens=1).notice == TOY_NOTICE
    assert not model.is_toy
    assert model.chat("Hi", max_tokens=1).notice is None
