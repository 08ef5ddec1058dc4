"""How large a rewritten schema may be, so that compiling it takes seconds at most.

The schema is measured written out: parts that are used in several places count in each. Limits are per schema, or for
all tools of a request.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from edge_runtime.errors import MessageError

MAX_VALUES = 100_000
"""JSON values; an object or array (a schema, or a value of an enum) counts as `COMPOSITE`."""
COMPOSITE = 10
MAX_PROPERTIES = 1000
"""Per object: every mask of the vocabulary goes through all properties that may follow."""
MAX_TEXT, MAX_PATTERN = 1 << 15, 1 << 18
"""Characters of one name or value, which is tokenised whole; and of a pattern."""
MAX_TOGETHER = 8
"""Patterns that may apply to one text together: the states of their automata multiply."""
MAX_MULTIPLE = 200_000
"""Of `multipleOf` without its decimal point: its automaton has a state for every remainder."""


def check_size(root: dict[str, Any]) -> None:
    """Check the size of a schema; its parts may be shared, but must not contain themselves.

    Raises
    ------
    MessageError
        When it is too large to be compiled.
    """
    sizes = _Sizes()
    if sizes.of(root) > MAX_VALUES:
        raise MessageError(
            f"The schema has more than {MAX_VALUES} values, each mapping and list counted as {COMPOSITE}, once its "
            "conditions are written out; use fewer branches, enum values, conditions inside one another, or tools."
        )
    if _Together(root).most > MAX_TOGETHER:
        raise MessageError(
            f"The schema has an allOf of more than {MAX_TOGETHER} schemas with patterns or formats, which is the "
            "limit; use fewer patterns."
        )
    numerators = sizes.multiples if not sizes.combines else {math.lcm(*sizes.multiples)}
    if max(numerators, default=1) > MAX_MULTIPLE:
        raise MessageError(
            f"The schema asks for multiples of {max(numerators)} (without decimal points), expected at most "
            f"{MAX_MULTIPLE}; use a smaller or rounder multipleOf."
        )


class _Sizes:
    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self.multiples: set[int] = set()
        """Numerators of all `multipleOf`."""
        self.combines = False
        """Whether several of them may apply to one number."""

    def of(self, value: Any, *, is_pattern: bool = False) -> int:
        if isinstance(value, str):
            check_text(value, MAX_PATTERN if is_pattern else MAX_TEXT)
        if not isinstance(value, dict | list):
            return 1
        if id(value) not in self._known:
            self._known[id(value)] = COMPOSITE + self._inside(value)
        return self._known[id(value)]

    def _inside(self, value: dict[str, Any] | list[Any]) -> int:
        if isinstance(value, list):
            return sum(map(self.of, value))
        for name in value:
            check_text(name, MAX_PATTERN)
        named = value.get("properties")
        for name in named if isinstance(named, dict) else ():
            check_text(name)
        if isinstance(named, dict) and len(named) > MAX_PROPERTIES:
            raise MessageError(
                f"The schema has an object of {len(named)} properties, expected at most {MAX_PROPERTIES}; use "
                "patternProperties, or objects inside one another."
            )
        self.combines |= "allOf" in value or ("multipleOf" in value and len(_REFERRING & value.keys()) > 0)
        multiple = value.get("multipleOf")
        if isinstance(multiple, int | float) and not isinstance(multiple, bool):
            self.multiples.add(Fraction(str(multiple)).numerator)
        return sum(self.of(inner, is_pattern=name == "pattern") for name, inner in value.items())


_REFERRING = {"$ref", "anyOf", "oneOf"}
_PATTERNS = frozenset(("pattern", "patternProperties", "format"))


def check_text(text: str, most: int = MAX_TEXT) -> None:
    """Check one text of a schema.

    Raises
    ------
    MessageError
        When it is too long to be compiled.
    """
    if len(text) > most:
        raise MessageError(
            f"The schema has a text of {len(text)} characters ({text[:20]!r}…), expected at most {most}; shorten it."
        )


class _Together:
    """Counts how many schemas with a pattern apply together in one place, references followed.

    Parameters
    ----------
    root : the schema.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._known: dict[int, int] = {}
        self._with_pattern: dict[int, bool] = {}
        self.most = 0
        self._visit(root)

    def _visit(self, node: Any) -> None:
        stack, seen = [node], set[int]()
        while stack:
            value = stack.pop()
            if id(value) in seen or not isinstance(value, dict | list):
                continue
            seen.add(id(value))
            if isinstance(value, dict) and ("allOf" in value or "$ref" in value):
                self.most = max(self.most, self._together(value))
            stack += value.values() if isinstance(value, dict) else value

    def _together(self, schema: Any) -> int:
        """Number of schemas with a pattern, at any depth, that apply together with this one."""
        if not isinstance(schema, dict):
            return 0
        if id(schema) not in self._known:
            self._known[id(schema)] = 0  # for recursive references
            branches = schema.get("allOf", [])
            own = [value for name, value in schema.items() if name not in ("allOf", "$defs")]
            has_pattern = not _PATTERNS.isdisjoint(schema) or any(map(self._has_pattern, own))
            found = has_pattern + sum(map(self._together, branches if isinstance(branches, list) else []))
            self._known[id(schema)] = found + self._together(self._target(schema.get("$ref")))
        return self._known[id(schema)]

    def _target(self, reference: Any) -> Any:
        name = reference.removeprefix("#/$defs/") if isinstance(reference, str) else None
        return self._root.get("$defs", {}).get(name)

    def _has_pattern(self, value: Any) -> bool:
        if isinstance(value, list):
            return any(map(self._has_pattern, value))
        if not isinstance(value, dict):
            return False
        if id(value) not in self._with_pattern:
            inside = any(map(self._has_pattern, value.values()))
            self._with_pattern[id(value)] = inside or not _PATTERNS.isdisjoint(value)
        return self._with_pattern[id(value)]
