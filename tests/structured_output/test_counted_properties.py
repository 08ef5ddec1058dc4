"""`minProperties` and `maxProperties` with optional names."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import jsonschema
import pytest

from edge_runtime import MessageError
from random_answers import RandomAnswers


@pytest.fixture(scope="module")
def writer() -> RandomAnswers:
    return RandomAnswers("demo")


def flags(n: int, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "boolean"} for i in range(n)}, **more}


def names_of(writer: RandomAnswers, schema: dict[str, Any], seeds: int = 200) -> set[tuple[str, ...]]:
    """The sets of names in answers, each of them valid."""
    form, found = writer.form(schema), set()
    for seed in range(seeds):
        value = json.loads(writer.text(form, seed))
        jsonschema.Draft202012Validator(schema).validate(value)
        found.add(tuple(sorted(value)))
    return found


@pytest.mark.parametrize(("low", "high"), [(1, None), (2, None), (3, None), (0, 1), (1, 2), (0, 0), (2, 2), (1, 9)])
def test_every_allowed_number_of_names_is_possible(writer, low, high):
    schema = flags(3, minProperties=low) | ({} if high is None else {"maxProperties": high})
    most = 3 if high is None else min(high, 3)
    wanted = {names for n in range(low, most + 1) for names in combinations(("p0", "p1", "p2"), n)}
    assert names_of(writer, schema) == wanted


def test_required_names_count(writer):
    assert names_of(writer, flags(3, required=["p1"], minProperties=2, maxProperties=2)) == {
        ("p0", "p1"),
        ("p1", "p2"),
    }
    assert names_of(writer, flags(3, required=["p1"], maxProperties=1)) == {("p1",)}
    assert all(len(names) >= 4 for names in names_of(writer, flags(3, required=["p0", "p1", "p2"], minProperties=4)))


def test_inside_other_schemas(writer):
    inner = flags(3, minProperties=1)
    for schema in (
        {"type": "object", "properties": {"a": inner}, "required": ["a"]},
        {"type": "array", "items": {"$ref": "#/$defs/one"}, "minItems": 2, "maxItems": 2, "$defs": {"one": inner}},
        {"anyOf": [inner, {"type": "integer", "maximum": 3}]},
        {**inner, "not": {"required": ["p1"]}},
    ):
        form = writer.form(schema)
        for seed in range(8):
            jsonschema.Draft202012Validator(schema).validate(json.loads(writer.text(form, seed)))


def test_what_cannot_be_expressed_is_refused(writer):
    with pytest.raises(MessageError, match="together with other conditions"):
        writer.form(flags(3, minProperties=1, dependentRequired={"p0": ["p1"]}))
    with pytest.raises(MessageError, match="minProperties"):
        writer.form(flags(30, minProperties=15))
    with pytest.raises(MessageError, match="excludes every value"):
        writer.form(flags(2, minProperties=3, additionalProperties=False))
