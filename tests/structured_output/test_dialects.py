"""Schemas as people and their tools write them: what is kept, what is ignored with a note, what is refused."""

from __future__ import annotations

import base64
import ipaddress
import json
import logging
import re
import uuid
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import MessageError
from edge_runtime.structured_output.answer_form import warn_once
from edge_runtime.structured_output.formats import KNOWN
from edge_runtime.structured_output.keywords import KEYWORDS, REWRITTEN, meant_word
from edge_runtime.structured_output.schema import bound_schema
from pydantic_models import MODELS
from random_answers import RandomAnswers

N_ANSWERS = 5


@pytest.fixture(scope="module")
def writer() -> RandomAnswers:
    return RandomAnswers("demo")


def an_object(optional: Any = None, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {**properties, **(optional or {})}, "required": [*properties]}


def values(writer: RandomAnswers, schema: Any, n: int = N_ANSWERS, max_tokens: int = 600) -> list[Any]:
    form = writer.form(schema)
    return [json.loads(writer.text(form, seed, max_tokens)) for seed in range(n)]


def valid(found: list[Any], schema: Any, draft: Any = jsonschema.Draft202012Validator) -> list[Any]:
    for value in found:
        draft(schema, format_checker=draft.FORMAT_CHECKER).validate(value)
    return found


def notes(schema: Any) -> str:
    return " ".join(bound_schema(schema).notes)


# --- annotations -------------------------------------------------------------------------------------------------

ANNOTATIONS: dict[str, Any] = {
    "discriminator": {"propertyName": "t", "mapping": {"a": "#/components/schemas/A"}},
    "example": 3,
    "x-order": 1,
    "x-nullable": False,
    "xml": {"name": "n"},
    "externalDocs": {"url": "https://example.org"},
    "strict": True,
    "contentEncoding": "base64",
    "contentMediaType": "application/json",
    "contentSchema": {"type": "integer"},
    "markdownDescription": "**n**",
    "enumNames": ["One"],
    "propertyOrdering": ["a"],
    "unit": "kg",
    "ui:widget": "textarea",
    "note": "short words are no misspellings of `not`",
}


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_an_annotation_passes_with_a_note(writer, name):
    schema = an_object(a={"type": "string", "maxLength": 4, name: ANNOTATIONS[name]})
    valid(values(writer, schema), schema)
    assert f"{name!r} says nothing" in notes(schema)
    assert "$.properties.a" in notes(schema)


@pytest.mark.parametrize(
    "name", ["title", "description", "default", "examples", "$comment", "deprecated", "readOnly"]
)
def test_annotations_of_json_schema_itself_need_no_note(writer, name):
    schema = {"type": "null", name: "x"}
    assert values(writer, schema, 1) == [None]
    assert not notes(schema)


@given(st.sampled_from([*KEYWORDS, *REWRITTEN]).filter(lambda name: len(name) > 4 and "$" not in name), st.data())
def test_a_misspelt_keyword_is_refused(name, data):
    at = data.draw(st.integers(1, len(name) - 2))
    wrong = data.draw(
        st.sampled_from(
            [name[:at] + name[at + 1 :], name[:at] + "z" + name[at:], name.upper(), f"{name[:at]}_{name[at:]}"]
        )
    )
    if wrong not in KEYWORDS and wrong not in REWRITTEN:
        assert meant_word(wrong) is not None
        with pytest.raises(MessageError, match="it seems to mean"):
            bound_schema({wrong: 1})


def test_a_note_is_logged_once(writer, caplog):
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="edge_runtime"):
        for _ in range(3):
            form = writer.form(an_object(a={"type": "null", "x-a": 1}, b={"type": "null", "x-a": 2}))
    assert [record.message for record in caplog.records] == [f"Schema: {note}" for note in form.notes]
    assert form.notes == (
        "$.properties.a['x-a'] and 1 more: 'x-a' says nothing about which values are valid; it is ignored.",
    )


# --- nullable ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "boolean", "nullable": True},
        {"type": "string", "enum": ["a"], "nullable": True},
        {"allOf": [{"$ref": "#/$defs/d"}], "nullable": True},
        {"$ref": "#/$defs/d", "nullable": True},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 1, "nullable": True},
    ],
)
def test_nullable_allows_null_and_what_there_was(writer, schema):
    found = values(writer, {**schema, "$defs": {"d": {"const": 1}}}, 20)
    assert None in found
    assert any(value is not None for value in found)
    assert None not in values(writer, {**schema, "nullable": False, "$defs": {"d": {"const": 1}}}, 20)


# --- formats and patterns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_format_is_enforced(writer, name):
    schema = {"type": "string", "format": name}
    valid(values(writer, schema), schema)
    assert not notes(schema)


@pytest.mark.parametrize("name", ["date", "date-time"])
def test_days_exist(name):
    pattern = json.loads(bound_schema({"type": "string", "format": name}).text)["pattern"]
    rest = "T10:00:00Z" if name == "date-time" else ""
    for day, exists in {
        "2024-02-29": True, "2023-02-29": False, "1900-02-29": False, "2000-02-29": True, "2024-04-31": False,
        "2024-12-31": True, "0000-01-01": False, "0001-01-01": True, "2024-13-01": False, "2024-00-10": False,
    }.items():  # fmt: skip
        assert bool(re.match(pattern, day + rest)) == exists, day
    assert not re.match(pattern, "2024-02-29T10:00:60Z")


@pytest.mark.parametrize(
    "name", ["password", "binary", "path", "file-path", "ipvanyaddress", "json-string", "color", "phone", "regex"]
)
def test_other_formats_are_annotations(writer, name):
    schema = {"type": "string", "format": name, "maxLength": 4}
    valid(values(writer, schema), schema)
    assert "is not enforced" in notes(schema)


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("uuid4", lambda text: uuid.UUID(text).version == 4),
        ("guid", uuid.UUID),
        ("base64", lambda text: base64.b64decode(text, validate=True) is not None),
        ("byte", lambda text: base64.b64decode(text, validate=True) is not None),
        ("ipvanyaddress", ipaddress.ip_address),
        ("cidrv4", ipaddress.ip_interface),
    ],
)
def test_formats_of_tools_are_enforced_where_they_fit(writer, name, reads):
    for text in values(writer, {"type": "string", "format": name, "maxLength": 40}):
        assert reads(text)


def test_formats_of_integers_are_ranges(writer):
    for name, low, high in (("int8", -128, 127), ("uint8", 0, 255), ("int32", -(2**31), 2**31 - 1)):
        assert all(low <= n <= high for n in values(writer, {"type": "integer", "format": name}, 20))


LOOK_AROUND = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_.]*)[A-Za-z0-9_]@[a-z]+\.[a-z]{2,}$"


def test_a_known_format_replaces_a_pattern_that_cannot_be_enforced(writer):
    for name in KNOWN:
        schema = {"type": "string", "format": name, "pattern": r"(?=.)\b.*"}
        assert f"the format {name!r} is enforced instead" in notes(schema)
        values(writer, schema, 1)
    with pytest.raises(MessageError, match=r"\$\.pattern cannot be enforced: regex parse error.*look-around"):
        bound_schema({"type": "string", "format": "password", "pattern": LOOK_AROUND})


def test_a_pattern_takes_precedence_over_a_format_of_a_tool(writer):
    schema = {"type": "string", "format": "nanoid", "pattern": "^[a-z]{3}$"}
    valid(values(writer, schema), schema)
    assert not notes(schema)


def test_a_pattern_that_can_be_enforced_applies_with_its_format(writer):
    schema = {"type": "string", "format": "date", "pattern": "^20[0-9]{2}-"}
    assert all(text.startswith("20") for text in valid(values(writer, schema), schema))
    assert not notes(schema)


# --- branches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["anyOf", "oneOf"])
def test_a_branch_that_cannot_be_enforced_is_dropped(writer, word):
    schema = {word: [{"type": "string", "pattern": r"^(?!a)\d+$"}, {"type": "integer"}, {"$ref": "#/$defs/b"}]}
    schema["$defs"] = {"b": {"type": "object", "properties": {"x": {"pattern": "(?=a)"}}}}
    assert all(isinstance(value, int) for value in valid(values(writer, schema), schema))
    assert "anyOf[0].pattern cannot be enforced" in notes(schema).replace("oneOf", "anyOf")
    assert "The other branches remain." in notes(schema)


def test_a_branch_is_not_dropped_where_that_would_widen(writer):
    with pytest.raises(MessageError, match=r"\$\.not\.anyOf\[0\]\.pattern cannot"):
        bound_schema({"not": {"anyOf": [{"pattern": "(?=a)"}, {"const": 1}]}})


def test_optional_values_of_zod(writer):
    schema = an_object({"a": {"anyOf": [{"anyOf": [{"not": {}}, {"type": "boolean"}]}, {"type": "null"}]}})
    valid(values(writer, schema, 10), schema)
    assert {json.dumps(value) for value in values(writer, schema, 20)} > {"{}"}


def test_overlapping_branches_are_read_as_any_of(writer):
    schema = {
        "type": "array",
        "items": {"oneOf": [{"minimum": 3, "type": "integer"}, {"type": "number"}]},
        "maxItems": 2,
    }
    form = writer.form(schema)
    assert "it is read as anyOf" in " ".join(form.notes)
    for seed in range(5):
        assert all(isinstance(n, int | float) for n in json.loads(writer.text(form, seed)))


CAT, DOG = (
    {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]} for kind in ("cat", "dog")
)


@pytest.mark.parametrize(
    ("branches", "are_disjoint"),
    [
        ([{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], True),
        ([{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/cat"}], False),
        ([CAT, {**DOG, "required": []}, {"type": "null"}], True),
        ([{**CAT, "required": []}, {**DOG, "required": []}], False),
        ([{"type": "integer"}, {"type": "number"}], False),
        ([{"type": "integer"}, {"type": ["string", "null"]}], True),
        ([{"const": 1}, {"enum": [2, 3]}], True),
        ([{"const": 1}, {"const": 1.0}], False),
        ([{}, {"type": "null"}], False),
    ],
)
def test_branches_that_exclude_one_another_need_no_note(writer, branches, are_disjoint):
    schema = {"oneOf": branches, "$defs": {"cat": CAT, "dog": DOG}}
    form = writer.form(schema)
    assert (not form.notes) == are_disjoint
    if are_disjoint:
        valid([json.loads(writer.text(form, seed)) for seed in range(5)], schema)


# --- conditions expressed with other keywords --------------------------------------------------------------------

SHORT = {"type": "string", "maxLength": 2}
REWRITTEN_SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "number"}},
    {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": SHORT, "minProperties": 1},
    {"type": "object", "propertyNames": {"$ref": "#/$defs/c"},
     "minProperties": 2, "$defs": {"c": {"enum": ["a", "."]}}},
    {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "required": ["a"]},
    {"type": "object", "propertyNames": {"pattern": "^[a-z]{2}$"}, "additionalProperties": SHORT, "minProperties": 2},
    {"type": "object", "propertyNames": {"minLength": 3, "maxLength": 4}, "minProperties": 1},
    {"type": "object", "propertyNames": False},
    {"type": "object", "propertyNames": {"not": {"const": "a"}}, "minProperties": 1, "maxProperties": 2},
    {"type": "string", "not": {"const": ""}, "maxLength": 1},
    {"enum": ["x", "y", 1, None], "not": {"enum": ["x", 1]}},
    {"type": "integer", "minimum": 0, "maximum": 2, "not": {"const": 1}},
    {"type": ["string", "null", "boolean"], "maxLength": 1, "not": {"type": ["null", "boolean"]}},
    {"type": "string", "not": {"enum": ["a", "b", "ab", ""]}, "maxLength": 2, "pattern": "^[ab]*$"},
    {"type": ["boolean", "null"], "not": {"anyOf": [{"const": True}, {"const": None}]}},
    {"type": "integer", "maximum": 5, "not": {"not": {"minimum": 3}}},
    {**an_object({"a": SHORT, "b": SHORT}), "not": {"required": ["a"]}},
    {**an_object({"a": SHORT, "b": SHORT}), "not": {"required": ["a", "b"]}},
    {**an_object({"a": SHORT, "b": SHORT, "c": SHORT}), "dependentRequired": {"a": ["b"], "c": ["a"]}},
    {**an_object({"b": SHORT}, a=SHORT), "dependentRequired": {"a": ["b"]}},
    {**an_object({"a": SHORT}), "dependentSchemas": {"a": {"properties": {"d": {"const": 1}}, "required": ["d"]}}},
    {"type": "array", "contains": {"type": "integer"}, "items": {"type": ["integer", "null"]}, "maxItems": 3},
    {"type": "array", "contains": {"const": 7}, "minContains": 2, "maxItems": 4},
    {"type": "array", "contains": {"const": 7}, "minContains": 0, "maxItems": 1},
    {"type": "array", "prefixItems": [{"type": "integer"}], "unevaluatedItems": False},
    {**an_object(a=SHORT), "unevaluatedProperties": False},
    {**an_object(kind={"enum": ["x", "y"]}), "if": {"properties": {"kind": {"const": "x"}}},
     "then": {"required": ["v"]}, "else": {"properties": {"w": {"const": 1}}, "required": ["w"]}},
    {**an_object({"land": SHORT, "zip": SHORT}), "if": {"properties": {"land": {"const": "US"}},
     "required": ["land"]}, "then": {"properties": {"zip": {"pattern": "^[0-9]+$"}}, "required": ["zip"]}},
    {**an_object({"a": SHORT, "b": SHORT}), "if": {"required": ["a"]}, "else": {"required": ["b"]}},
    {"type": "boolean", "if": {"const": 1}},
    {"type": "boolean", "then": {"const": 1}},
]  # fmt: skip


@pytest.mark.parametrize("schema", REWRITTEN_SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_conditions_hold(writer, schema):
    valid(values(writer, schema, 12), schema)
    assert not notes(schema)


def test_both_sides_of_a_condition_are_possible(writer):
    schema = REWRITTEN_SCHEMAS[-5]
    assert {value["kind"] for value in values(writer, schema, 20)} == {"x", "y"}


@pytest.mark.parametrize(
    ("schema", "draft"),
    [
        (
            {
                "type": "array",
                "items": [{"type": "integer"}, {"const": "b"}],
                "additionalItems": False,
                "minItems": 2,
            },
            7,
        ),
        ({"type": "array", "items": [], "additionalItems": False}, 7),
        ({**an_object({"a": SHORT, "b": SHORT}), "dependencies": {"a": ["b"], "b": {"required": ["a"]}}}, 7),
        ({"type": "integer", "minimum": 3, "exclusiveMinimum": True, "maximum": 5, "exclusiveMaximum": False}, 4),
        ({"definitions": {"a/b": {"const": 1}}, "allOf": [{"$ref": "#/definitions/a~1b"}]}, 7),
    ],
)
def test_older_drafts_are_read(writer, schema, draft):
    validator = {4: jsonschema.Draft4Validator, 7: jsonschema.Draft7Validator}[draft]
    valid(values(writer, schema, 10), schema, validator)


@pytest.mark.parametrize("max_tokens", [30, 45, 60])
def test_answers_are_whole_with_few_tokens(writer, max_tokens):
    schema = an_object(
        {"note": {"type": "string"}},
        when={"type": "string", "format": "date"},
        tags={"items": SHORT, "type": "array"},
    )
    valid(values(writer, schema, 10, max_tokens=max_tokens + 25), schema)


# --- what generators write ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_answers_are_objects_of_pydantic(writer, kind):
    form = writer.form(kind.model_json_schema())
    for seed in range(5):
        for max_tokens in (200, 500):
            kind.model_validate_json(writer.text(form, seed, max_tokens))
