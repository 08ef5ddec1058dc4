"""JSON schema → the same schema, checked and bounded, ready to be compiled into a grammar.

A keyword that cannot be enforced is an error with its path, never ignored. What the schema leaves without an end gets
one: strings and arrays a default bound, objects no other properties than those named. Every answer within the
narrower schema is valid under the given one. Knows nothing of tokens; see `grammar` for what follows.

Source of the keywords' meaning: JSON Schema 2020-12, Core and Validation. Drafts 6 and 7 agree in all that is
supported here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from edge_runtime.errors import MessageError

DEFAULT_MAX_LENGTH = 1024  # characters of a string without maxLength
PATTERN_MAX_LENGTH = 128  # the same, where a pattern or format may not let a string end at once
DEFAULT_MAX_ITEMS = 64
LARGEST_INTEGER = 2**53 - 1  # JSON readers that know only floats still tell all up to this apart
MAX_DEPTH = 64  # of the schema itself, so that no walk over it exhausts the stack
MAX_SCHEMA_BYTES = 1 << 20

FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
COMBINATORS = ("allOf", "anyOf", "oneOf", "$ref")
ANNOTATIONS = frozenset(
    (
        "$schema",
        "$id",
        "$comment",
        "title",
        "description",
        "default",
        "examples",
        "readOnly",
        "writeOnly",
        "deprecated",
    )
)
"""Keywords that say nothing about which values are valid."""


@dataclass(frozen=True)
class BoundedSchema:
    """A schema that can be compiled."""

    text: str
    """The schema as JSON."""
    is_open: bool
    """Whether it left something without a bound, so that the longest answer says nothing about what is wanted."""


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


_COUNT = (_is_count, "a whole number that is not negative")
_NUMBER = (_is_number, "a number")
_SCHEMAS = (_is_schemas, "a list of schemas")
_MAP = (_is_map, "a mapping of names to schemas")
_ANY: tuple[Callable[[Any], bool], str] = (lambda value: True, "")

KEYWORDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_is_type, f"one of {', '.join(TYPES)}, or a list of them"),
    "enum": (lambda value: isinstance(value, list) and bool(value), "a list of values"),
    "const": _ANY,
    "$ref": (lambda value: isinstance(value, str) and value.startswith("#"), "a reference into this schema, '#/...'"),
    "anyOf": _SCHEMAS,
    "oneOf": _SCHEMAS,
    "allOf": _SCHEMAS,
    "properties": _MAP,
    "patternProperties": _MAP,
    "additionalProperties": _ANY,
    "required": (_is_names, "a list of names"),
    "minProperties": _COUNT,
    "maxProperties": _COUNT,
    "items": (lambda value: not isinstance(value, list), "a schema (a list of them is called prefixItems now)"),
    "prefixItems": _SCHEMAS,
    "minItems": _COUNT,
    "maxItems": _COUNT,
    "minLength": _COUNT,
    "maxLength": _COUNT,
    "pattern": (lambda value: isinstance(value, str), "a regular expression"),
    "format": (lambda value: value in FORMATS, f"one of {', '.join(FORMATS)}"),
    "minimum": _NUMBER,
    "maximum": _NUMBER,
    "exclusiveMinimum": _NUMBER,
    "exclusiveMaximum": _NUMBER,
    "multipleOf": (lambda value: _is_number(value) and value > 0, "a number above 0"),
}
"""Every keyword that is enforced, with what its value must be."""


def bound_schema(schema: Mapping[str, Any], *, pattern_max_length: int = PATTERN_MAX_LENGTH) -> BoundedSchema:
    """Check a schema and bound what it leaves open.

    Parameters
    ----------
    schema : as JSON data; it is not changed.
    pattern_max_length : bound of strings that have a pattern or format and no maxLength.

    Raises
    ------
    MessageError
        Naming the JSON path of a keyword that is unknown, cannot be enforced, or has a wrong value.
    """
    if not isinstance(schema, Mapping):
        raise MessageError(f"The schema is of type {type(schema).__name__}; expected a JSON schema as a mapping.")
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        root = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise MessageError(
            f"The schema is not JSON data ({error}); expected mappings, lists and plain values."
        ) from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise MessageError(
            f"The schema has {len(text)} characters, expected at most {MAX_SCHEMA_BYTES}; simplify it."
        )
    walk = _Walk(root, pattern_max_length)
    walk.visit(root, "$", combined=_has_combined_reference(root))
    for name in ("$schema", "$id"):  # would only change what is not supported, or how references are resolved
        root.pop(name, None)
    return BoundedSchema(json.dumps(root, ensure_ascii=False), walk.is_open)


class _Walk:
    """Visits every schema that the root makes use of, checks it and writes bounds into it."""

    def __init__(self, root: dict[str, Any], pattern_max_length: int) -> None:
        self._root, self._pattern_max_length = root, pattern_max_length
        self._seen: set[int] = set()
        self._underway: set[int] = set()
        self.is_open = False

    def visit(self, schema: Any, path: str, depth: int = 0, *, combined: bool) -> None:
        """Check one schema and what is inside.

        Parameters
        ----------
        combined : whether it is, or is inside, a schema that is intersected with another: a bound written here could
            contradict that one.
        """
        if isinstance(schema, bool):
            self.is_open |= schema
            return
        if not isinstance(schema, dict):
            raise MessageError(f"{path} is {_short(schema)}; expected a schema: a mapping, true or false.")
        if depth > MAX_DEPTH:
            raise MessageError(f"{path} is nested more than {MAX_DEPTH} deep; expected a flatter schema.")
        if id(schema) in self._seen:
            self.is_open |= id(schema) in self._underway  # recursion
            return
        self._seen.add(id(schema))
        self._underway.add(id(schema))
        self._check(schema, path, depth)
        for place, inner, is_intersected in self._inner(schema, path):
            self.visit(inner, place, depth + 1, combined=combined or is_intersected)
        if not combined:
            self._bound(schema)
        self.is_open |= combined
        self._underway.discard(id(schema))

    def _check(self, schema: dict[str, Any], path: str, depth: int) -> None:
        for name, value in schema.items():
            where = path + _step(name)
            if name in KEYWORDS:
                fits, expected = KEYWORDS[name]
                if not fits(value):
                    raise MessageError(f"{where} is {_short(value)}; expected {expected}.")
            elif name not in ANNOTATIONS and name not in ("$defs", "definitions"):
                raise MessageError(
                    f"{where} cannot be enforced: the keyword {name[:40]!r} is not supported. Leave it out, or say "
                    f"it with these: {', '.join(KEYWORDS)}."
                )
            elif name == "$id" and depth:
                raise MessageError(
                    f"{where} cannot be enforced: schemas inside a schema have no $id here; use $defs."
                )

    def _inner(self, schema: dict[str, Any], path: str) -> list[tuple[str, Any, bool]]:
        """Schemas directly inside one: path, schema, whether it is intersected with another."""
        combined = _is_mixed(schema)
        inner: list[tuple[str, Any, bool]] = []
        for name in ("properties", "patternProperties"):
            inner += [
                (path + _step(name) + _step(key), value, combined) for key, value in schema.get(name, {}).items()
            ]
        inner += [
            (path + _step(name), schema[name], combined)
            for name in ("additionalProperties", "items")
            if name in schema
        ]
        for name in ("prefixItems", "anyOf", "oneOf", "allOf"):
            is_all = name == "allOf"
            inner += [
                (f"{path}.{name}[{i}]", value, combined or is_all) for i, value in enumerate(schema.get(name, []))
            ]
        if "$ref" in schema:
            inner.append((path + _step("$ref"), self._target(schema["$ref"], path + _step("$ref")), combined))
        return inner

    def _target(self, reference: str, where: str) -> Any:
        node: Any = self._root
        for part in unquote(reference[1:]).split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if (
                isinstance(node, list)
                and key.isascii()
                and key.isdecimal()
                and len(key) < 10
                and int(key) < len(node)
            ):
                node = node[int(key)]
            elif isinstance(node, dict) and key in node:
                node = node[key]
            else:
                raise MessageError(f"{where} is {_short(reference)}, which is not in this schema; add it to $defs.")
        if reference != "#" and not reference.startswith("#/"):
            raise MessageError(
                f"{where} is {_short(reference)}; expected a reference by path, such as '#/$defs/name'."
            )
        return node

    def _bound(self, schema: dict[str, Any]) -> None:
        """Write default bounds into a schema that has none."""
        if any(name in schema for name in ("const", "enum", *COMBINATORS)):
            return
        types = schema.get("type", [*TYPES])
        types = types if isinstance(types, list) else [types]
        if "string" in types and "maxLength" not in schema:
            ends_anywhere = "pattern" not in schema and "format" not in schema
            bound = DEFAULT_MAX_LENGTH if ends_anywhere else self._pattern_max_length
            schema["maxLength"] = max(bound, int(schema.get("minLength", 0)))
            self.is_open = True
        if "array" in types and "maxItems" not in schema and schema.get("items") is not False:
            schema["maxItems"] = max(
                DEFAULT_MAX_ITEMS, int(schema.get("minItems", 0)), len(schema.get("prefixItems", []))
            )
            self.is_open = True
        if "multipleOf" in schema or ("integer" in types and "number" not in types):
            _bound_number(schema)
        if "object" in types:
            if "additionalProperties" not in schema and _names_all_it_wants(schema):
                schema["additionalProperties"] = False
            self.is_open |= schema.get("additionalProperties") is not False and "maxProperties" not in schema


def _bound_number(schema: dict[str, Any]) -> None:
    """Give a number an end where digits could be appended for ever; floats always may end, see `json_position`."""
    highest = max(schema.get(name, -math.inf) for name in ("minimum", "exclusiveMinimum"))
    lowest = min(schema.get(name, math.inf) for name in ("maximum", "exclusiveMaximum"))
    if lowest == math.inf and highest < LARGEST_INTEGER:
        schema["maximum"] = LARGEST_INTEGER
    if highest == -math.inf and lowest > -LARGEST_INTEGER:
        schema["minimum"] = -LARGEST_INTEGER


def _names_all_it_wants(schema: dict[str, Any]) -> bool:
    """Whether an object schema makes sense without any other properties than the named ones."""
    named = schema.get("properties", {})
    return (
        "properties" in schema
        and "patternProperties" not in schema
        and "minProperties" not in schema
        and set(schema.get("required", [])) <= set(named)
    )


def _is_mixed(schema: dict[str, Any]) -> bool:
    """Whether a schema has a combinator and says more than that, so that both are intersected."""
    return sum(name in KEYWORDS for name in schema) > 1 and any(name in schema for name in COMBINATORS)


def _has_combined_reference(root: Any) -> bool:
    """Whether a reference is intersected with something: it stands beside other keywords or below such a schema.

    What it refers to may then be intersected anywhere. Properties that are named like keywords count as such.
    """
    stack = [(root, False)]
    while stack:
        node, combined = stack.pop()
        if isinstance(node, dict):
            if "$ref" in node and (combined or _is_mixed(node)):
                return True
            stack += [(value, combined or _is_mixed(node) or name == "allOf") for name, value in node.items()]
        elif isinstance(node, list):
            stack += [(item, combined) for item in node]
    return False


def _step(name: str) -> str:
    """One step of a JSON path."""
    return f".{name}" if re.fullmatch(r"[A-Za-z_$][\w$]*", name) else f"[{name[:40]!r}]"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "…"
