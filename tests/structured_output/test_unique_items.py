"""Arrays with `uniqueItems`: no duplicates, and an end in time."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import MessageError
from edge_runtime.structured_output.json_position import JsonPosition
from edge_runtime.structured_output.places import Place, canonical
from random_answers import RandomAnswers


@pytest.fixture(scope="module")
def writer() -> RandomAnswers:
    return RandomAnswers("demo")


def unique(items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "uniqueItems": True, **more}


PAIR = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, 2]}}, "required": ["a", "b"]}
SCHEMAS: list[dict[str, Any]] = [
    unique({"enum": ["a", "b", "c"]}, minItems=3),
    unique({"enum": [1, "1", None, True]}, minItems=4),
    unique({"enum": ["red", "reddish", "re", "green"]}, minItems=4),
    unique({"type": "integer", "minimum": 1, "maximum": 5}, minItems=5),
    unique({"type": "integer", "minimum": -1, "maximum": 1}, minItems=3),
    unique({"type": "boolean"}, minItems=2),
    unique({"type": "string", "maxLength": 1}, minItems=9, maxItems=12),
    unique({"type": "string", "pattern": "^[ab]{2}$"}, minItems=4),
    unique({"type": "number"}, minItems=9, maxItems=12),
    unique({"type": "string"}, minItems=12),
    unique(PAIR, minItems=4),
    unique(unique({"enum": [1, 2, 3]}, minItems=2), minItems=5, maxItems=8),
    unique({"anyOf": [{"const": 1}, {"type": "null"}, {"items": {"const": 0}, "type": "array", "maxItems": 1}]},
           minItems=4),
    {**unique({"enum": ["x", "y"]}, minItems=2), "prefixItems": [{"const": "x"}]},
    {**unique(False, minItems=2), "prefixItems": [{"enum": ["a", "b"]}, {"enum": ["a"]}]},
    {**unique({"enum": [1, 2]}, minItems=3), "prefixItems": [{"enum": [1, 2, 3]}]},
    {**unique({"$ref": "#/$defs/b"}, minItems=3), "prefixItems": [{"anyOf": [{"type": "boolean"}, {"const": 1}]}],
     "$defs": {"b": {"type": "boolean"}}},
    {**unique({"enum": ["d"]}, minItems=4), "prefixItems": [{"enum": ["a", "b", "c", "d"]}, {"enum": ["b", "c"]},
                                                            {"enum": ["c", "b"]}]},
    {**unique({"type": "integer", "minimum": 1, "maximum": 2}, minItems=3, maxItems=3),
     "prefixItems": [{"type": "integer", "minimum": 0, "maximum": 2}]},
    {"type": "object", "properties": {"l": {**unique({"type": "string"}, minItems=2), "prefixItems": [
        {"enum": ["a", "b"]}, {"const": "b"}]}}, "required": ["l"]},
    {"$ref": "#/$defs/s", "$defs": {"s": unique({"$ref": "#/$defs/colour"}, minItems=2), "colour": {"enum": [1, 2]}}},
    {"type": "object", "additionalProperties": unique({"enum": [1, 2]}, minItems=2), "minProperties": 2,
     "maxProperties": 2},
    {"type": "object", "patternProperties": {"^a": unique({"enum": [1, 2]}, minItems=2)}, "minProperties": 1},
    {"anyOf": [unique({"enum": ["x", "y"]}, minItems=2), {"type": "null"}]},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
@pytest.mark.parametrize("max_tokens", [160, 600])
def test_no_item_comes_twice(writer, schema, max_tokens):
    form = writer.form(schema)
    for seed in range(6):
        found = json.loads(writer.text(form, seed, max_tokens))
        jsonschema.Draft202012Validator(schema).validate(found)


def test_every_order_of_a_small_enum_is_possible(writer):
    form = writer.form(SCHEMAS[0])
    assert len({tuple(json.loads(writer.text(form, seed))) for seed in range(60)}) == 6


def test_other_arrays_may_repeat_items(writer):
    twice = {"type": "array", "items": {"const": "x"}, "minItems": 2, "maxItems": 2}
    schema = {"type": "object", "properties": {"s": unique({"enum": ["x", "y"]}), "l": twice}, "required": ["s", "l"]}
    assert json.loads(writer.text(writer.form(schema)))["l"] == ["x", "x"]


def test_false_has_no_effect(writer):
    schema = {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2, "uniqueItems": False}
    assert json.loads(writer.text(writer.form(schema))) == [1, 1]


@pytest.mark.parametrize(
    "schema",
    [
        unique({"enum": ["a", "b"]}, minItems=3),
        unique({"type": "boolean"}, minItems=3),
        unique(PAIR, minItems=5),
        unique({"const": 1}, minItems=2),
    ],
)
def test_more_items_than_there_are_is_an_error(writer, schema):
    with pytest.raises(MessageError, match="unique items"):
        writer.form(schema)


# --- the place ---------------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([1.0, 0.5, -0.0])
VALUES = st.recursive(
    SCALARS | st.text('ab"\\,] ', max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=1), inner, max_size=2),
    max_leaves=6,
)  # fmt: skip


def has_twice(value: Any) -> bool:
    """Whether an array in a value holds duplicates, by jsonschema's own rule."""
    if isinstance(value, dict):
        return any(map(has_twice, value.values()))
    if not isinstance(value, list):
        return False
    return any(map(has_twice, value)) or not jsonschema.Draft202012Validator({"uniqueItems": True}).is_valid(value)


EVERYWHERE: dict[str, Any] = {"uniqueItems": True, "items": {"$ref": "#"}, "additionalProperties": {"$ref": "#"}}


@given(VALUES, st.sampled_from([(",", ":"), (", ", ": ")]), st.integers(1, 5))
def test_what_is_refused_is_what_jsonschema_refuses(value, separators, size):
    text = json.dumps(value, separators=separators).encode()
    position = JsonPosition(Place.of(EVERYWHERE))
    parts = [text[i:j] for i, j in pairwise([*range(0, len(text), size), len(text)])]
    assert all(position.feed(part) for part in parts) == (not has_twice(value))


def test_one_value_has_one_canonical_spelling():
    assert canonical(b"1") == canonical(b"1.0") == canonical(b"10e-1")
    assert canonical(b'{"a":1,"b":[2.0]}') == canonical(b'{"b": [2], "a": 1}')
    assert len({canonical(text) for text in (b"1", b"true", b'"1"', b"[1]", b"null", b"1.5")}) == 6
