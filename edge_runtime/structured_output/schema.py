"""JSON schema → the same schema, checked and bounded, ready to be compiled into a grammar.

A binding keyword that cannot be enforced is an error with its path, never ignored (`dialects`). What the schema
leaves unbounded gets a bound: strings and arrays a default length, objects only the named properties. Every answer
within the narrower schema is valid under the given one. Knows nothing about tokens; see `grammar` for what follows.

Source for the meaning of keywords: JSON Schema 2020-12, Core and Validation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_runtime.errors import MessageError
from edge_runtime.structured_output.dialects import Dialect
from edge_runtime.structured_output.effort import Effort
from edge_runtime.structured_output.keywords import COMBINATORS, KEYWORDS, TYPES
from edge_runtime.structured_output.schema_size import check_size

DEFAULT_MAX_LENGTH = 1024  # characters of a string without maxLength
PATTERN_MAX_LENGTH = 128  # the same, where a pattern or format may not allow a string to end at once
DEFAULT_MAX_ITEMS = 64
MAX_INTEGER = 2**53 - 1  # the largest that JSON readers with floats only can distinguish from its neighbours
MAX_SCHEMA_BYTES = 1 << 20
MAX_DIGITS = 300  # of a whole number


@dataclass(frozen=True)
class BoundedSchema:
    """A schema that can be compiled."""

    text: str
    """The schema as JSON, without what grammars cannot enforce (`uniqueItems`)."""
    root: dict[str, Any]
    """The schema including that."""
    has_unique_items: bool
    """Whether there is any `uniqueItems`."""
    is_open: bool
    """Whether it left something unbounded, so that the longest answer says nothing about what is wanted."""
    notes: tuple[str, ...] = ()
    """What is ignored or read differently, in sentences."""


def bound_schema(
    schema: Mapping[str, Any], *, pattern_max_length: int = PATTERN_MAX_LENGTH, effort: Effort | None = None
) -> BoundedSchema:
    """Check a schema and bound what it leaves unbounded.

    Parameters
    ----------
    schema : as JSON data; it is not changed.
    pattern_max_length : bound of strings that have a pattern or format and no maxLength.
    effort : limits the work.

    Raises
    ------
    MessageError
        Naming the JSON path of a keyword that is unknown, cannot be enforced, or has a wrong value; or when it is too
        large, or takes too much work.
    """
    if not isinstance(schema, Mapping):
        raise MessageError(f"The schema is of type {type(schema).__name__}; expected a JSON schema as a mapping.")
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode()  # lone surrogates are not characters
        root = json.loads(text, parse_int=_finite)
    except (TypeError, ValueError, RecursionError) as error:
        raise MessageError(
            f"The schema is not JSON data ({error}); expected mappings, lists and plain values."
        ) from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise MessageError(
            f"The schema has {len(text)} characters, expected at most {MAX_SCHEMA_BYTES}; simplify it."
        )
    effort = effort or Effort()
    dialect = Dialect(root, effort)
    root = dialect.rewritten()
    check_size(root)
    walk = _Walk(root, pattern_max_length)
    walk.visit(root, combined=_has_combined_reference(root))
    for array in walk.unique:
        del array["uniqueItems"]
    text = json.dumps(root, ensure_ascii=False)
    effort.check_time()
    for array in walk.unique:
        array["uniqueItems"] = True
    return BoundedSchema(text, root, bool(walk.unique), walk.is_open, dialect.notes)


def _finite(digits: str) -> int:
    """Read a whole number within the range of floats, as readers of JSON expect it."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits is beyond any float")
    return int(digits)


class _Walk:
    """Visits every schema that the root uses, and writes bounds into it."""

    def __init__(self, root: dict[str, Any], pattern_max_length: int) -> None:
        self._root, self._pattern_max_length = root, pattern_max_length
        self._seen: set[int] = set()
        self._underway: set[int] = set()
        self.is_open = False
        self.unique: list[dict[str, Any]] = []
        """Those with `uniqueItems`."""

    def visit(self, schema: Any, *, combined: bool) -> None:
        """Bound one schema and those inside it.

        Parameters
        ----------
        combined : whether it is, or is inside, a schema that is intersected with another, which a bound here could
            contradict.
        """
        if isinstance(schema, bool):
            self.is_open |= schema
            return
        if id(schema) in self._seen:
            self.is_open |= id(schema) in self._underway  # recursion
            return
        self._seen.add(id(schema))
        self._underway.add(id(schema))
        for inner, is_intersected in self._inner(schema):
            self.visit(inner, combined=combined or is_intersected)
        if "uniqueItems" in schema:
            self.unique.append(schema)
        if not combined:
            self._bound(schema)
        self.is_open |= combined
        self._underway.discard(id(schema))

    def _inner(self, schema: dict[str, Any]) -> list[tuple[Any, bool]]:
        """Schemas directly inside one, and whether each is intersected with another."""
        combined = _is_mixed(schema)
        inner: list[tuple[Any, bool]] = []
        for name in ("properties", "patternProperties"):
            inner += [(value, combined) for value in schema.get(name, {}).values()]
        inner += [(schema[name], combined) for name in ("additionalProperties", "items") if name in schema]
        for name in ("prefixItems", "anyOf", "oneOf", "allOf"):
            inner += [(value, combined or name == "allOf") for value in schema.get(name, [])]
        if "$ref" in schema:
            inner.append((self._target(schema["$ref"]), combined))
        return inner

    def _target(self, reference: str) -> Any:
        return self._root if reference == "#" else self._root["$defs"][reference.removeprefix("#/$defs/")]

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
    """Bound a number to which digits could be appended for ever; floats can always end, see `json_position`."""
    highest = max(schema.get(name, -math.inf) for name in ("minimum", "exclusiveMinimum"))
    lowest = min(schema.get(name, math.inf) for name in ("maximum", "exclusiveMaximum"))
    if lowest == math.inf and highest < MAX_INTEGER:
        schema["maximum"] = MAX_INTEGER
    if highest == -math.inf and lowest > -MAX_INTEGER:
        schema["minimum"] = -MAX_INTEGER


def _names_all_it_wants(schema: dict[str, Any]) -> bool:
    """Whether an object schema makes sense with only the named properties."""
    named = schema.get("properties", {})
    return (
        "properties" in schema
        and "patternProperties" not in schema
        and "minProperties" not in schema
        and set(schema.get("required", [])) <= set(named)
    )


def _is_mixed(schema: dict[str, Any]) -> bool:
    """Whether a schema has a combinator and other keywords, so that both are intersected."""
    return sum(name in KEYWORDS for name in schema) > 1 and any(name in schema for name in COMBINATORS)


def _has_combined_reference(root: Any) -> bool:
    """Whether a reference is intersected with something: it has keywords next to it or is inside such a schema.

    Its target may then be intersected anywhere. Properties that are named like keywords count as keywords.
    """
    stack = [(root, False)]
    while stack:
        node, combined = stack.pop()
        if isinstance(node, dict):
            if "$ref" in node and (combined or _is_mixed(node)):
                return True
            combined = combined or _is_mixed(node)
            stack += [(value, combined or name == "allOf") for name, value in node.items()]
        elif isinstance(node, list):
            stack += [(item, combined) for item in node]
    return False
