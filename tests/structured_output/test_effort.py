"""Schemas and grammars that ask for endless work: refused in time with a sentence, abandoned when nobody waits."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import pytest

from edge_runtime import MessageError, Model
from edge_runtime.structured_output import effort
from edge_runtime.structured_output.answer_form import choose_form
from edge_runtime.structured_output.effort import MAX_SECONDS, AnswerEffort, Effort, TooMuchWorkError
from edge_runtime.structured_output.grammar import Grammar
from edge_runtime.structured_output.text_form import choose_text_form
from random_answers import RandomAnswers


@pytest.fixture(scope="module")
def writer() -> RandomAnswers:
    return RandomAnswers("demo")


def string(**more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": {"type": "string", **more}}, "required": ["a"]}


def keys(n: int, length: int) -> dict[str, Any]:
    """An object with several long required keys."""
    names = [f"k{i:02d}" + "x" * (length - 3) for i in range(n)]
    return {"type": "object", "propertyNames": {"enum": names}, "minProperties": n}


def properties(n: int, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(n)}, **more}


def references(depth: int, width: int) -> dict[str, Any]:
    """A schema whose shortest value has width to the power of depth parts."""
    names = [f"p{i}" for i in range(width)]
    made: dict[str, Any] = {f"d{depth}": {"type": "integer"}}
    for i in range(depth):
        inner = {name: {"$ref": f"#/$defs/d{i + 1}"} for name in names}
        made[f"d{i}"] = {"type": "object", "properties": inner, "required": names}
    return {"$ref": "#/$defs/d0", "$defs": made}


def conditions(depth: int) -> dict[str, Any]:
    """Nested conditions: written out, each level is three times as large as the one inside it."""
    made: dict[str, Any] = {"required": ["z"]}
    for i in range(depth):
        made = {"if": {"required": [f"a{i}", f"b{i}", f"c{i}"]}, "then": {"required": ["y"]}, "else": made}
    return {"type": "object", **made}


def unique(items: Any, n: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "uniqueItems": True, "minItems": n}


def nested(schema: dict[str, Any], depth: int, n: int) -> dict[str, Any]:
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "minItems": n, "maxItems": n}
    return schema


def function(number: int) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {f"p{i}": string(maxLength=number + i + 1) for i in range(8)}}
    return {"type": "function", "function": {"name": f"f{number}", "parameters": parameters}}


FITTING: dict[str, dict[str, Any]] = {
    "14 of 14 keys": keys(14, 100),
    "many branches": {"oneOf": [{"type": "object", "properties": {"k": {"const": i}}, "required": ["k"]}
                                for i in range(1000)]},
    "large enum": {"enum": [f"value {i}" for i in range(30_000)]},
    "large alternation": string(pattern="^(" + "|".join(f"w{i}" for i in range(9000)) + ")$"),
    "long text": string(minLength=700),
    "nested repetitions": string(pattern="^((a{1,100}){1,100}){1,100}$"),
    "optional properties": properties(300),
    "unique values": unique({"enum": [f"v{i}" for i in range(40)]}, 40),
    "endless bounds": {"type": "array", "items": {"type": "string", "maxLength": 10**9}, "maxItems": 10**9},
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too long a text": (string(minLength=10**6), "at most 4096 tokens"),
    "too many items": ({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}, "at most 4096 tokens"),
    "too many keys": ({"type": "object", "minProperties": 10**6}, "at most 4096 tokens"),
    "most of a thousand keys": ({"type": "object", "patternProperties": {"^[0-9]{3}$": {"type": "null"}},
                                 "additionalProperties": False, "minProperties": 950}, "more than 100000 steps|4096"),
    "references": (references(20, 10), "at most 4096 tokens"),
    "conditions": (conditions(40), "more than 100000 values"),
    "endless reference": ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "endless"),
    "huge enum": ({"enum": [*range(100_001)]}, "more than 100000 values"),
    "objects in an enum": ({"enum": [{"a": [i] * 5} for i in range(9000)]}, "more than 100000 values"),
    "properties": (properties(1001), "1001 properties"),
    "long constant": ({"const": "x" * 40_000}, "40000 characters"),
    "multiples": ({"type": "integer", "multipleOf": 1234567}, "multiples of 1234567"),
    "multiples together": ({"type": "integer", "allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}, "99400891"),
    "patterns together": ({"type": "string", "allOf": [{"pattern": f"a.{{{i}}}"} for i in range(30)]}, "allOf"),
    "patterns together by reference": (
        {**properties(0), "$defs": {f"d{i}": {"properties": {"x": {"pattern": f"a.{{{i}}}"}}} for i in range(12)},
         "allOf": [{"$ref": f"#/$defs/d{i}"} for i in range(12)]}, "allOf"),
    "backtracking": (string(pattern="^(.*a){20}$"), "too complex|cannot be enforced"),
    "nested arrays": (nested({"type": "integer"}, 10, 10), "at most 4096 tokens"),
    "more unique items than there are": (unique({"enum": [f"v{i}" for i in range(200)]}, 201), "unique items"),
    "unique items that are long": (unique({"enum": ["x" * 300 + str(i) for i in range(100)]}, 100), "4096 tokens"),
    "deep": (nested({"type": "integer"}, 1000, 1), "not JSON data|nested more"),
}  # fmt: skip
GRAMMARS: dict[str, tuple[str, str]] = {
    "nothing": ("root ::= root", "no text is of its form"),
    "doubling": ("root ::= a0\n" + "\n".join(f"a{i} ::= a{i + 1} a{i + 1}" for i in range(30)) + '\na30 ::= "x"',
                 "too big"),
    "intersections": ("start: A\nA: " + " & ".join(f"/.*a.{{{i}}}/" for i in range(1, 99)), "97 intersections"),
    "schema inside": ('start: %json {"type": "integer", "multipleOf": 1234567}', "multiples of 1234567"),
    "brackets": ("start: " + "(" * 40_000 + '"a"' + ")" * 40_000, "nested"),
    "brackets of GBNF": ("root ::= " + "(" * 40_000 + '"a"' + ")" * 40_000, "cannot be read"),
}  # fmt: skip


class GoneError(Exception):
    pass


def form_of(writer: RandomAnswers, seconds: float = MAX_SECONDS, **options: Any) -> Any:
    """The form, found within the time that is allowed, and a moment for what cannot be interrupted."""
    began, work = time.thread_time(), Effort(seconds=seconds)
    try:
        form = choose_form(
            options.get("schema"),
            False,
            options.get("tools", ()),
            options.get("tool_choice", "auto"),
            False,
            writer.tokenizer,
            lambda: writer.vocabulary,
            work,
        )
        texts = {name: options[name] for name in ("choices", "regex", "grammar") if name in options}
        return form or choose_text_form(texts, lambda: writer.vocabulary, work)
    finally:
        assert time.thread_time() - began < seconds + 3


@pytest.mark.parametrize("name", FITTING)
def test_large_schemas_are_enforced(writer, name):
    schema = FITTING[name]
    text = writer.text(form_of(writer, schema=schema), max_tokens=5000)
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_take_for_ever_is_refused(writer, name):
    schema, why = REFUSED[name]
    with pytest.raises(MessageError, match=why):
        form_of(writer, schema=schema)


@pytest.mark.parametrize("name", GRAMMARS)
def test_grammars_that_would_take_for_ever_are_refused(writer, name):
    grammar, why = GRAMMARS[name]
    with pytest.raises(MessageError, match=why):
        form_of(writer, grammar=grammar)


def test_hundreds_of_tools_share_one_effort(writer):
    tools = [function(i) for i in range(200)]
    form = form_of(writer, tools=tools, tool_choice="required")
    assert form.n_shortest > 0
    with pytest.raises(TooMuchWorkError, match="CPU time"):
        form_of(writer, seconds=0.01, tools=tools, tool_choice="required")


def test_work_ends_when_nobody_waits_any_more(writer):
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1
        if looks == 30:
            raise GoneError

    with pytest.raises(GoneError):
        Grammar(REFUSED["most of a thousand keys"][0], writer.vocabulary, Effort(check=look))
    assert looks == 30


def test_a_cancelled_request_abandons_its_schema(demo: Model):
    def gone() -> None:
        raise GoneError

    with pytest.raises(GoneError):
        demo.submit("Hello", schema=string(), on_check=gone)


# --- while the answer is written -----------------------------------------------------------------------------------


def test_a_step_that_takes_too_long_fails_only_its_answer(writer, monkeypatch):
    form = writer.form({**unique({"enum": [f"v{i}" for i in range(60)]}, 60), "maxItems": 60})  # its end is far
    monkeypatch.setattr(effort, "ANSWER_SAVED_S", 0.0)
    with pytest.raises(TooMuchWorkError, match="for every token"):
        writer.text(form, max_tokens=5000)


def test_a_known_completion_is_used_instead(writer, monkeypatch):
    schema = unique({"enum": [f"v{i}" for i in range(40)]}, 40)
    form = writer.form(schema)
    monkeypatch.setattr(effort, "ANSWER_SAVED_S", 0.0)
    text = writer.text(form, max_tokens=form.n_shortest + 20)  # the end is near from the first token on
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def test_saved_time_is_bounded():
    work = AnswerEffort()
    for _ in range(100):
        with work.step():
            pass
    with work.step():
        began = time.thread_time()
        while time.thread_time() - began < effort.ANSWER_SAVED_S + 0.1:
            pass
        with pytest.raises(TooMuchWorkError):
            work.spend(effort.CHECK_EVERY)
