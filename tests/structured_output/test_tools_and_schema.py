"""Tools and a schema in one request: the answer is a call, or JSON of the schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edge_runtime import MessageError, Model
from edge_runtime.structured_output.tools import TOOL_CALL, TOOL_CALL_END
from random_answers import RandomAnswers
from structured_output.test_tools import TOOLS, WEATHER

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"degrees": {"type": "integer"}, "sky": {"enum": ["clear", "grey"]}},
    "required": ["degrees", "sky"],
    "additionalProperties": False,
}
ODD: dict[str, Any] = {"name": "odd", "parameters": {"type": "object", "not": {"pattern": "a"}}}


@pytest.fixture(scope="module")
def model(exact_folder: Path):
    with Model.load(exact_folder) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def writer(exact_folder: Path) -> RandomAnswers:
    return RandomAnswers(exact_folder)


def ask(model: Model, *, call: bool | None = None, **options: Any):
    """Ask for either; `call` says which one the model prefers."""
    bias = {} if call is None else {model.tokenizer.special_ids[TOOL_CALL]: 100.0 if call else -100.0}
    options = {"tools": TOOLS, "schema": SCHEMA, "seed": 3, "max_tokens": 200, "logit_bias": bias} | options
    return model.chat("What is the weather in Rome?", stream=True, **options)


@pytest.mark.parametrize("thinking", [False, True])
def test_the_answer_is_a_call_or_json(model, thinking):
    for call in (True, False):
        # In reasoning the tag is text; a call can only start after it.
        stream = ask(model, call=call, thinking=thinking, thinking_budget=9 if thinking else None)
        pieces = [*stream]
        made = stream.result()
        assert made.finish_reason == "stop"
        assert not made.malformed_calls
        kinds = {piece.kind for piece in pieces if piece.text} - {"reasoning"}
        if call:
            assert kinds == {"tool_call"}
            assert made.answer == ""
            (found,) = made.tool_calls
            assert found.name in ("weather", "clock")
            if found.name == "weather":
                jsonschema.validate(found.arguments, WEATHER["function"]["parameters"])
        else:
            assert kinds == {"answer"}
            assert made.tool_calls == []
            jsonschema.validate(json.loads(made.answer), SCHEMA)
            assert "".join(piece.text for piece in pieces if piece.kind == "answer") == made.answer


def test_free_json_and_tools_go_together_too(model):
    assert isinstance(json.loads(ask(model, call=False, schema=None, json=True).result().answer), dict)
    assert ask(model, call=True, schema=None, json=True).result().tool_calls


@pytest.mark.parametrize("choice", ["required", "clock"])
def test_a_wanted_call_is_a_call(model, choice):
    made = ask(model, call=False, tool_choice=choice).result()
    assert made.answer == ""
    assert len(made.tool_calls) == 1


def test_none_leaves_the_schema(model):
    made = ask(model, call=True, tool_choice="none").result()
    assert made.tool_calls == []
    jsonschema.validate(json.loads(made.answer), SCHEMA)


def test_both_are_drawn_and_whole(writer):
    form = writer.form(SCHEMA, tools=TOOLS)
    begun = {writer.text(form, seed).startswith(TOOL_CALL) for seed in range(30)}
    assert begun == {True, False}
    for seed in range(30):
        for max_tokens in (60, 400):
            text = writer.text(form, seed, max_tokens)
            if text.startswith(TOOL_CALL):
                assert text.endswith(TOOL_CALL_END)
                text = text.removeprefix(TOOL_CALL).removesuffix(TOOL_CALL_END)
                assert json.loads(text)["name"] in ("weather", "clock")
            else:
                jsonschema.validate(json.loads(text), SCHEMA)


def test_a_call_that_would_not_fit_is_not_started(writer):
    long = {"type": "object", "properties": {"text": {"type": "string", "minLength": 300}}, "required": ["text"]}
    form = writer.form(SCHEMA, tools=[{"name": "long", "parameters": long}])
    for seed in range(10):
        jsonschema.validate(json.loads(writer.text(form, seed, 150)), SCHEMA)


def test_tools_that_cannot_be_enforced_are_offered_freely(writer):
    form = writer.form(SCHEMA, tools=[ODD])
    texts = [writer.text(form, seed, 60) for seed in range(9)]
    assert any(text.startswith(TOOL_CALL) and '"odd"' in text for text in texts)
    with pytest.raises(MessageError, match="parameters of the tool 'odd'"):
        writer.form(SCHEMA, tools=[ODD], tool_choice="required")


def test_a_vocabulary_without_the_tags_says_so(model, monkeypatch):
    known = {text: i for text, i in model.tokenizer.special_ids.items() if text != TOOL_CALL}
    monkeypatch.setattr(model.tokenizer, "special_ids", known)
    with pytest.raises(MessageError, match=r"lacks the tokens <tool_call>.*without one of the two"):
        model.chat("Hi", tools=TOOLS, schema=SCHEMA)


def test_started_json_continues_and_is_not_a_call(model):
    begun = [{"role": "user", "content": "?"}, {"role": "assistant", "content": '{"degrees": 12'}]
    bias = {model.tokenizer.special_ids[TOOL_CALL]: 100.0}
    made = model.chat(begun, tools=TOOLS, schema=SCHEMA, logit_bias=bias, max_tokens=60, continue_final_message=True)
    jsonschema.validate(json.loads(begun[1]["content"] + made.answer), SCHEMA)


# --- reasoning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tools", [(), TOOLS])
def test_reasoning_leaves_tokens_for_a_closed_schema(model, tools):
    closed = {
        "type": "object",
        "properties": {"a": {"const": "x" * 60}, "b": {"enum": ["y" * 60]}},
        "required": ["a", "b"],
    }
    special = model.tokenizer.special_ids
    bias = dict.fromkeys([special["</think>"], special[TOOL_CALL], *model.tokenizer.stop_ids], -100.0)
    options = {"schema": closed, "tools": tools, "logit_bias": bias, "seed": 1}
    needed = model.chat("say", **options).completion_tokens
    for room in (needed + 4, needed + 20, 2 * needed - 5):
        made = model.chat("say", thinking=True, max_tokens=room, **options)
        jsonschema.validate(json.loads(made.answer), closed)
        assert made.completion_tokens <= room
        assert made.reasoning_tokens > 0
