"""Random JSON schemas that have answers: every keyword that is enforced, nested up to a depth."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from edge_runtime.structured_output.formats import KNOWN as FORMATS
from edge_runtime.structured_output.keywords import KEYWORDS

WORDS = (
    "name",
    "total",
    "colour",
    "items",
    "date",
    "größe",
    "a b",
    'x"y',
    "note",
    "id",
    "数",
    "line_1",
    "left",
    "top",
)
PATTERNS = ("^[A-Z]{2}-[0-9]{3}$", "^(ab|cd)+$", "[0-9]", "^[^a]*$", "^\\d{4}$", "^\\w+@\\w+$")


class SchemaMaker:
    """Makes schemas from a seed.

    Parameters
    ----------
    depth : most schemas inside one another.
    """

    def __init__(self, seed: int, depth: int = 4) -> None:
        self._random, self._depth = random.Random(seed), depth

    def schema(self) -> dict[str, Any]:
        """One schema."""
        self._definitions: dict[str, Any] = {}
        made = self._make(self._depth)
        if self._definitions:
            made["$defs"] = self._definitions
        return made

    def _make(self, depth: int) -> dict[str, Any]:
        plain = [self._integer, self._number, self._string, self._string, self._choice, self._several_types]
        nested = [self._object, self._object, self._array, self._any_of, self._one_of, self._all_of, self._reference]
        if depth > 1 and self._random.random() < 0.75:
            return self._random.choice(nested)(depth - 1)
        return self._random.choice(plain)()

    def _maybe(self, share: float = 0.5) -> bool:
        return self._random.random() < share

    def _integer(self) -> dict[str, Any]:
        made: dict[str, Any] = {"type": "integer"}
        low = self._random.randint(-1000, 1000)
        if self._maybe():
            made[self._random.choice(("minimum", "exclusiveMinimum"))] = low
        if self._maybe():
            made[self._random.choice(("maximum", "exclusiveMaximum"))] = low + self._random.randint(50, 5000)
        if self._maybe(0.3):
            made["multipleOf"] = self._random.choice((2, 3, 7, 25))
        return made

    def _number(self) -> dict[str, Any]:
        made: dict[str, Any] = {"type": "number"}
        low = self._random.randint(-100, 100) / 4
        if self._maybe():
            made[self._random.choice(("minimum", "exclusiveMinimum"))] = low
        if self._maybe():
            made[self._random.choice(("maximum", "exclusiveMaximum"))] = low + self._random.randint(1, 400) / 4
        if self._maybe(0.3):
            made["multipleOf"] = self._random.choice((0.5, 0.25, 1))
        return made

    def _string(self) -> dict[str, Any]:
        made: dict[str, Any] = {"type": "string"}
        kind = self._random.randrange(5)
        if kind == 0:
            made["pattern"] = self._random.choice(PATTERNS)
        elif kind == 1:
            made["format"] = self._random.choice(FORMATS)
        elif kind < 4:
            low = self._random.randint(0, 8)
            if self._maybe():
                made["minLength"] = low
            if self._maybe(0.7):
                made["maxLength"] = low + self._random.randint(0, 20)
        return made

    def _choice(self) -> dict[str, Any]:
        values = ["red", "grün", 'a"b\\c', 1, -2.5, True, False, None, "", [1, "x"], {"k": [None]}]
        if self._maybe():
            return {"const": self._random.choice(values)}
        return {"enum": self._random.sample(values, self._random.randint(1, 5))}

    def _several_types(self) -> dict[str, Any]:
        return {"type": self._random.sample(("null", "boolean", "integer", "number"), 2), "title": "one of two"}

    def _array(self, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {"type": "array"}
        low = self._random.randint(0, 3)
        if self._maybe():
            made["minItems"] = low
        if self._maybe(0.7):
            made["maxItems"] = low + self._random.randint(0, 3)
        if self._maybe(0.3):
            made["prefixItems"] = [self._make(depth) for _ in range(self._random.randint(1, 2))]
        if self._maybe(0.9):
            made["items"] = self._make(depth)
        if self._maybe(0.4) and "prefixItems" not in made:
            made["uniqueItems"] = True
            made["items"] = self._make_many()
        return made

    def _make_many(self) -> dict[str, Any]:
        """A schema with more values than an array is asked to hold."""
        return self._random.choice(
            [
                {"enum": self._random.sample(WORDS, 6)},
                {"type": "integer", "minimum": 1, "maximum": 7},
                {"type": "string", "maxLength": 3},
                {"type": "number"},
                {"type": "object", "properties": {"on": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}}},
                {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
            ]
        )

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._random.sample(WORDS, self._random.randint(1, 4))
        made: dict[str, Any] = {"type": "object", "properties": {name: self._make(depth) for name in names}}
        kind = self._random.randrange(6)
        if kind == 0:
            made["additionalProperties"] = False
        elif kind == 1:
            made["additionalProperties"] = self._make(1)
        elif kind == 2:
            made["patternProperties"] = {"^p_[a-z]$": self._make(1), "^q[0-9]+$": self._make(1)}
            made["additionalProperties"] = False
        made["required"] = self._random.sample(names, self._random.randint(0, len(names)))
        if kind == 3:  # a map with a number of entries
            made = {"type": "object", "additionalProperties": self._make(depth), "minProperties": 1}
            made["maxProperties"] = self._random.randint(1, 4)
        return made

    def _any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._make(depth) for _ in range(self._random.randint(2, 3))]}

    def _one_of(self, depth: int) -> dict[str, Any]:
        """Branches that exclude one another: by type, or by a constant."""
        if self._maybe():
            return {"oneOf": [self._integer(), {"type": "string", "maxLength": 9}, {"type": "null"}]}
        kinds = self._random.sample(WORDS, 2)
        return {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": kind}, "value": self._make(depth)},
                    "required": ["kind"],
                }
                for kind in kinds
            ]
        }

    def _all_of(self, depth: int) -> dict[str, Any]:
        if self._maybe():
            return {"allOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 90, "multipleOf": 3}]}
        one, other = self._random.sample(WORDS, 2)
        return {
            "allOf": [
                {"type": "object", "properties": {one: self._make(depth)}, "required": [one]},
                {"type": "object", "properties": {other: self._string()}},
            ]
        }

    def _reference(self, depth: int) -> dict[str, Any]:
        name = f"d{len(self._definitions)}"
        self._definitions[name] = {}
        if self._maybe(0.3):  # a tree
            made: dict[str, Any] = {
                "type": "object",
                "properties": {
                    "value": self._integer(),
                    "next": {"type": "array", "items": {"$ref": f"#/$defs/{name}"}},
                },
                "required": ["value"],
            }
        else:
            made = self._make(depth)
        self._definitions[name] = made
        return {"$ref": f"#/$defs/{name}"}


def keywords(schema: Any) -> Counter[str]:
    """How often each keyword occurs in a schema; names of properties do not count."""
    found: Counter[str] = Counter()
    if isinstance(schema, list):
        for item in schema:
            found += keywords(item)
    if not isinstance(schema, dict):
        return found
    for name, value in schema.items():
        if name in KEYWORDS:
            found[name] += 1
        if name in ("properties", "patternProperties", "$defs"):
            for inner in value.values():
                found += keywords(inner)
        elif name not in ("const", "enum"):
            found += keywords(value)
    return found


def depth(schema: Any) -> int:
    """Most schemas inside one another, references apart."""
    if isinstance(schema, list):
        return max(map(depth, schema), default=0)
    if not isinstance(schema, dict):
        return 0
    inner = [
        depth([*value.values()] if name in ("properties", "patternProperties") else value)
        for name, value in schema.items()
        if name not in ("const", "enum", "$defs")
    ]
    return 1 + max(inner, default=0)
