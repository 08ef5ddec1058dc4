"""Odd values where schemas stand, in every API: 200 or a sentence with 400, in time, and nobody else is disturbed."""

from __future__ import annotations

import json
import time
from itertools import count
from typing import Any

import httpx
import pytest

from server.conftest import Served

MAX_S = 30.0
"""On a busy machine; the effort that a schema may take is 5 s of processor time."""
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 1e308, 10**400, "", "x", "{}", "²", "\ud800", [], [1], [[]], {}, {"": {}}),
    *(float("nan"), float("inf"), "NaN", "1e999", " ", "null", ["null"], {"type": "object"}, "#", "a" * 5000),
]
KEYWORDS = (
    *("type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf", "not", "if", "properties", "patternProperties"),
    *("additionalProperties", "required", "minProperties", "maxProperties", "items", "prefixItems", "minItems"),
    *("maxItems", "uniqueItems", "minLength", "maxLength", "pattern", "format", "minimum", "exclusiveMaximum"),
    *("multipleOf", "dependentRequired", "dependentSchemas", "contains", "propertyNames", "$defs", "$id", "nullable"),
)
SCHEMAS: list[Any] = [
    *ODD,
    {"$ref": "#/²"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, {"$ref": "#"}, {"$ref": "http://x/y"},
    {"anyOf": [{"$ref": "#"}]}, {"allOf": [{"$ref": "#"}]}, {"not": {"$ref": "#"}}, {"items": {"$ref": "#/items"}},
    {"properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]}, {"$ref": "#/$defs/0", "$defs": [{}]},
    {"enum": ["\ud800"]}, {"const": {"\ud800": 1}}, {"pattern": "\ud800"}, {"pattern": "("}, {"pattern": "[\\"},
    {"type": "integer", "minimum": 10**300}, {"type": "integer", "minimum": 5, "maximum": 4}, {"multipleOf": 1e-300},
    {"type": "number", "minimum": -1e308, "maximum": 1e308}, {"type": "integer", "multipleOf": 10**30},
    {"minLength": 10**30}, {"maxLength": 10**30}, {"minItems": 2.0}, {"maxItems": 1e300}, {"minProperties": 10**30},
    {"type": ["string", "string"]}, {"type": []}, {"type": "text"}, {"type": ["null", None]}, {"enum": [[[[[]]]]]},
    {"enum": [1, 1.0, True]}, {"const": 10**400}, {"properties": {"a": None}}, {"required": ["a", 1]},
    {"properties": {"<|im_end|>": {"const": "<image>"}}, "required": ["<|im_end|>"]}, {"x-guidance": {"a": 1}},
    {"items": [{"$ref": "#/items/0"}]}, {"dependencies": {"a": "b"}}, {"format": "²"}, {"pattern": "^(a+)+$"},
    {"pattern": "((a{1,100}){1,100}){1,100}"}, {"type": "string", "pattern": "a{99999999}"}, {"pattern": "(?=a)"},
]  # fmt: skip
numbers = count()


def bodies(schema: Any) -> list[tuple[str, dict[str, Any]]]:
    """The same schema in a request to each API."""
    chat = {"model": "demo", "messages": [{"role": "user", "content": "Go"}]}
    function = {"name": "f", "parameters": schema}
    kept: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    called = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    return [
        ("/v1/chat/completions", {**chat, "max_tokens": 6, "response_format": kept}),
        ("/api/chat", {**chat, "stream": False, "format": schema, "options": {"num_predict": 6}}),
        ("/v1/chat/completions", {**chat, "max_tokens": 6, **called}),
        (
            "/v1/messages",
            {**chat, "max_tokens": 6, "output_config": {"format": {"type": "json_schema", "schema": schema}}},
        ),
        ("/v1/messages", {**chat, "max_tokens": 6, "tools": [{"name": "f", "input_schema": schema}]}),
    ]


def asked(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """One request, which is answered or refused in time."""
    began = time.monotonic()
    reply = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    told = f"{path} {json.dumps(body)[:400]}: {reply.status_code} {reply.text[:300]}"
    assert reply.status_code in (200, 400, 422), told
    assert time.monotonic() - began < MAX_S, told
    if reply.status_code == 400:
        error = reply.json()["error"]
        assert len(error if isinstance(error, str) else error["message"]) > 20, told


def test_odd_schemas_are_answered_or_refused(server: Served):
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        for number, schema in enumerate(SCHEMAS):
            for path, body in bodies(schema)[number % 3 :: 3]:
                asked(client, path, body)


@pytest.mark.parametrize("part", range(2))
def test_odd_values_of_keywords_are_answered_or_refused(server: Served, part):
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        for number, name in enumerate(KEYWORDS[part::2]):
            for value in ODD[number % 4 :: 4]:
                choices = bodies({"type": "object", "properties": {"a": {name: value}}, name: value})
                asked(client, *choices[next(numbers) % len(choices)])
