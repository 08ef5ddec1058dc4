"""Schemas as Anthropic's packages send them → as they were meant.

Anthropic's servers enforce less of JSON Schema than this runtime, so the packages move the remainder into the
description, as `{maximum: 9, minimum: 0}` at its end, and check the answer themselves afterwards. Here it is moved
back, so that the answer passes. Source: anthropic-sdk-python's `lib/_parse/_transform.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_MOVED = re.compile(r"\{([^{}]*)\}\s*\Z")
_LIMIT = re.compile(
    r"(?:\A|, )(minimum|maximum|exclusiveMinimum|exclusiveMaximum|multipleOf|minLength|maxLength|minItems|maxItems)"
    r": (-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?=, |\Z)"
)


def as_meant(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema with the limits that stand at the ends of its descriptions."""
    found: dict[str, Any] = {key: _inside(key, value) for key, value in schema.items()}
    description = schema.get("description")
    moved = _MOVED.search(description) if isinstance(description, str) and "type" in schema else None
    if moved is not None:
        limits = {key: json.loads(number) for key, number in _LIMIT.findall(moved[1])}
        found = limits | found
    return found


_SCHEMAS = ("items", "additionalProperties", "not")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")


def _inside(key: str, value: Any) -> Any:
    """The value of a keyword, with the schemas in it as they were meant."""
    if key in _NAMED and isinstance(value, Mapping):
        return {name: as_meant(item) if isinstance(item, Mapping) else item for name, item in value.items()}
    if key in _LISTS and isinstance(value, list):
        return [as_meant(item) if isinstance(item, Mapping) else item for item in value]
    return as_meant(value) if key in _SCHEMAS and isinstance(value, Mapping) else value
