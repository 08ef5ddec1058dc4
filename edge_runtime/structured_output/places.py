"""Which schemas apply at a place in a JSON text, for what the grammar cannot enforce (`uniqueItems`).

A place stands for every schema that may apply there: where there are several (`anyOf`), each of them counts, so that
the check is at most narrower than what was asked for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

MAX_SCARCE = 64
"""Items of an array that are considered together, and values that they may have."""


@dataclass(frozen=True)
class Place:
    """Schemas that may apply to one value."""

    root: dict[str, Any]
    schemas: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, root: dict[str, Any]) -> Place:
        """The place of the whole text."""
        return cls._at(root, [root])

    @classmethod
    def _at(cls, root: dict[str, Any], found: Iterable[Any]) -> Place:
        """With all schemas that are combined or referred to."""
        left, known = [schema for schema in found if isinstance(schema, dict)], {}
        while left:
            schema = left.pop()
            if id(schema) in known:
                continue
            known[id(schema)] = schema
            inner = [item for name in ("anyOf", "oneOf", "allOf") for item in schema.get(name, [])]
            if "$ref" in schema:
                inner.append(_target(root, schema["$ref"]))
            left += [item for item in inner if isinstance(item, dict)]
        return cls(root, tuple(known.values()))

    @property
    def has_unique_items(self) -> bool:
        """Whether an array here must not hold the same value twice."""
        return any(schema.get("uniqueItems") is True for schema in self.schemas)

    @property
    def n_first(self) -> int:
        """Number of items of an array here that have schemas of their own."""
        return max((len(schema.get("prefixItems", ())) for schema in self.schemas), default=0)

    @cached_property
    def _scarce(self) -> list[frozenset[str] | None]:
        """Possible values of each required item of an array here; None where there are many.

        Empty if all items share the same values, or if several schemas may apply.
        """
        arrays = [schema for schema in self.schemas if {"items", "prefixItems", "uniqueItems"} & schema.keys()]
        if len(arrays) != 1 or not self.has_unique_items or "prefixItems" not in arrays[0]:
            return []
        first, rest = arrays[0]["prefixItems"], arrays[0].get("items", True)
        n = min(int(arrays[0].get("minItems", 0)), MAX_SCARCE)
        return [_few_values(self.root, first[i] if i < len(first) else rest, 0) for i in range(n)]

    @property
    def is_scarce(self) -> bool:
        """Whether even a new item may leave no value for a later one."""
        return any(values is not None for values in self._scarce)

    def leaves_enough(self, n_items: int, seen: frozenset[str]) -> bool:
        """Whether the items that must follow can all be new and distinct.

        Parameters
        ----------
        n_items, seen : number of items of the array so far, and the items in canonical spelling.
        """
        return _can_differ([values - seen for values in self._scarce[n_items:] if values is not None])

    def item(self, index: int) -> Place:
        """The place of an array's item."""
        found = []
        for schema in self.schemas:
            first = schema.get("prefixItems", [])
            found.append(first[index] if index < len(first) else schema.get("items"))
        return self._at(self.root, found)

    def value(self, key: str) -> Place:
        """The place of an object's value."""
        found = []
        for schema in self.schemas:
            named = [schema["properties"][key]] if key in schema.get("properties", {}) else []
            named += [
                inner for pattern, inner in schema.get("patternProperties", {}).items() if _may_match(pattern, key)
            ]
            found += named or [schema.get("additionalProperties")]
        return self._at(self.root, found)


def _few_values(root: dict[str, Any], schema: Any, depth: int) -> frozenset[str] | None:
    """The values that are valid under a schema, in canonical spelling; None if they are not listed."""
    if not isinstance(schema, dict) or depth > MAX_SCARCE or {"allOf", "not"} & schema.keys():
        return None
    if "enum" in schema or "const" in schema:
        listed: list[Any] = schema["enum"] if "enum" in schema else [schema["const"]]
        return frozenset(canonical(json.dumps(value).encode()) for value in listed)
    if schema.get("type") in ("boolean", "null"):
        return frozenset(("true", "false") if schema["type"] == "boolean" else ("null",))
    if schema.get("type") == "integer" and {"minimum", "maximum"} <= schema.keys():
        low, high = math.ceil(schema["minimum"]), math.floor(schema["maximum"])
        return frozenset(map(str, range(low, high + 1))) if high - low < MAX_SCARCE else None
    branches: list[Any] = schema.get("anyOf") or schema.get("oneOf") or []
    if "$ref" in schema:
        branches = [*branches, _target(root, schema["$ref"])]
    found = [_few_values(root, branch, depth + 1) for branch in branches]
    if not found or any(values is None for values in found):
        return None
    return frozenset[str]().union(*(values for values in found if values is not None))


def _can_differ(choices: list[frozenset[str]]) -> bool:
    """Whether one value can be chosen from each of several sets, none twice: a matching in a bipartite graph."""
    taken_by: dict[str, int] = {}

    def place(i: int, tried: set[str]) -> bool:
        for value in choices[i] - tried:
            tried.add(value)
            if value not in taken_by or place(taken_by[value], tried):
                taken_by[value] = i
                return True
        return False

    return all(place(i, set()) for i in range(len(choices)))


def _may_match(pattern: str, key: str) -> bool:
    try:
        return re.search(pattern, key) is not None
    except re.error:  # of another dialect
        return True


def _target(root: dict[str, Any], reference: str) -> Any:
    return root if reference == "#" else root["$defs"][reference.removeprefix("#/$defs/")]


def canonical(text: bytes) -> str:
    """The same spelling for all JSON texts of equal values, as JSON Schema compares them: 1 is 1.0, but not true."""
    return json.dumps(_plain(json.loads(text)), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
