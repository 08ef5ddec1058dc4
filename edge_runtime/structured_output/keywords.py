"""The keywords of JSON Schema: which are enforced, which are rewritten, and which say nothing about validity.

Sources: JSON Schema drafts 4 to 2020-12, OpenAPI 3.0 and 3.1, and what generators add to them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
COMBINATORS = ("allOf", "anyOf", "oneOf", "$ref")

Check = tuple[Callable[[Any], bool], str]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _is_type(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name in TYPES for name in names)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_schemas(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _is_map(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_schema(value: Any) -> bool:
    return isinstance(value, bool | dict)


_COUNT = (_is_count, "a whole number that is not negative")
_NUMBER = (_is_number, "a number")
_SCHEMA = (_is_schema, "a schema: a mapping, true or false")
_SCHEMAS = (_is_schemas, "a list of schemas")
_MAP = (_is_map, "a mapping of names to schemas")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_LIMIT = (lambda value: _is_number(value) or isinstance(value, bool), "a number")
_ANY: Check = (lambda value: True, "")

KEYWORDS: dict[str, Check] = {
    "type": (_is_type, f"one of {', '.join(TYPES)}, or a list of them"),
    "enum": (lambda value: isinstance(value, list) and bool(value), "a list of values"),
    "const": _ANY,
    "$ref": (lambda value: _is_text(value) and value.startswith("#"), "a reference into this schema, '#/...'"),
    "anyOf": _SCHEMAS,
    "oneOf": _SCHEMAS,
    "allOf": _SCHEMAS,
    "properties": _MAP,
    "patternProperties": _MAP,
    "additionalProperties": _SCHEMA,
    "required": (_is_names, "a list of names"),
    "minProperties": _COUNT,
    "maxProperties": _COUNT,
    "items": (lambda value: _is_schema(value) or isinstance(value, list), "a schema: a mapping, true or false"),
    "prefixItems": _SCHEMAS,
    "minItems": _COUNT,
    "maxItems": _COUNT,
    "uniqueItems": _FLAG,
    "minLength": _COUNT,
    "maxLength": _COUNT,
    "pattern": (_is_text, "a regular expression"),
    "format": (_is_text, "the name of a format"),
    "minimum": _NUMBER,
    "maximum": _NUMBER,
    "exclusiveMinimum": _LIMIT,
    "exclusiveMaximum": _LIMIT,
    "multipleOf": (lambda value: _is_number(value) and value > 0, "a number above 0"),
}
"""Every keyword that is enforced as it is, with a check of its value."""

REWRITTEN: dict[str, Check] = {
    "nullable": _FLAG,
    "additionalItems": _SCHEMA,
    "dependencies": _MAP,
    "dependentRequired": _MAP,
    "dependentSchemas": _MAP,
    "if": _SCHEMA,
    "then": _SCHEMA,
    "else": _SCHEMA,
    "not": _SCHEMA,
    "contains": _SCHEMA,
    "minContains": _COUNT,
    "maxContains": _COUNT,
    "propertyNames": _SCHEMA,
    "unevaluatedProperties": _SCHEMA,
    "unevaluatedItems": _SCHEMA,
}
"""Keywords that are expressed with others where possible; see `dialects`."""

QUIET = frozenset(
    (
        *("$schema", "$id", "$comment", "title", "description", "default", "examples", "readOnly", "writeOnly"),
        *("deprecated", "$defs", "definitions", "$anchor", "$vocabulary"),
    )
)
"""Annotations of JSON Schema itself, which nobody mistakes for a condition."""

BINDING = frozenset(
    (
        *("$dynamicRef", "$recursiveRef", "disallow", "extends", "divisibleBy"),
        *("formatMinimum", "formatMaximum", "formatExclusiveMinimum", "formatExclusiveMaximum"),
        *("instanceof", "typeof", "uniqueItemProperties", "allRequired", "anyRequired", "oneRequired", "prohibited"),
        *("patternRequired", "deepProperties", "deepRequired"),
        *("optionalProperties", "elements", "minExclusive", "maxExclusive"),
    )
)
"""Words that are binding in older drafts, in other schema languages or in validators' extensions."""


def meant_word(name: str) -> str | None:
    """The keyword that an unknown word seems to misspell: `max_length`, `requird`, `maxLenght`."""
    plain = _plain(name)
    for word in (*KEYWORDS, *REWRITTEN):
        known = _plain(word)
        if plain == known and not word.startswith("$"):
            return word
        if len(known) > 4 and (sorted(plain) == sorted(known) or _is_one_letter_off(plain, known)):
            return word
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def _is_one_letter_off(one: str, other: str) -> bool:
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one != other and any(
        one[same + skip_one :] == other[same + skip_other :] for skip_one, skip_other in ((0, 1), (1, 0), (1, 1))
    )
