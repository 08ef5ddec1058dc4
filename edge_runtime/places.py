"""Which schemas hold at a place of a JSON text, as far as the grammar cannot keep all they say (`uniqueItems`).

A place stands for every schema that may apply there: where there are several (`anyOf`), each of them counts, so that
what is checked is at most narrower than what was asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


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
        """With whatever is combined or referred to."""
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
        """Items of an array here that have schemas of their own."""
        return max((len(schema.get("prefixItems", ())) for schema in self.schemas), default=0)

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


def _may_match(pattern: str, key: str) -> bool:
    try:
        return re.search(pattern, key) is not None
    except re.error:  # of another dialect
        return True


def _target(root: dict[str, Any], reference: str) -> Any:
    return root if reference == "#" else root["$defs"][reference.removeprefix("#/$defs/")]


def canonical(text: bytes) -> str:
    """One spelling for all JSON texts of the same value, as JSON Schema compares them: 1 is 1.0, but not true."""
    return json.dumps(_plain(json.loads(text)), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
