"""A schema as people and their tools write it → one that says the same with the keywords that are enforced.

Old drafts, OpenAPI and what generators add are brought into one form; conditions without an enforced keyword (`if`,
`contains`, `dependentRequired`, …) are expressed with others, at most narrower than they were. What says nothing
about validity is dropped with a note; what is binding and cannot be enforced is an error with its path.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from edge_runtime.errors import MessageError
from edge_runtime.structured_output.compiling import fault
from edge_runtime.structured_output.effort import Effort
from edge_runtime.structured_output.formats import BY_GRAMMAR, PATTERNS, RANGES, WHERE_IT_FITS
from edge_runtime.structured_output.keywords import BINDING, KEYWORDS, QUIET, REWRITTEN, TYPES, meant_word
from edge_runtime.structured_output.rewriting import (
    are_disjoint,
    conditional,
    modernized,
    negated,
    unevaluated,
    with_contained,
    with_dependents,
    with_property_counts,
    with_property_names,
)
from edge_runtime.structured_output.schema_size import MAX_PATTERN, check_text

MAX_DEPTH = 64  # of the schema itself, so that no walk over it exhausts the stack


class CannotEnforceError(MessageError):
    """A part of a schema that is binding and cannot be enforced; as one branch of an anyOf it may be dropped."""


class Dialect:
    """Rewrites one schema.

    Parameters
    ----------
    root : as JSON data; it is not changed.
    effort : limits the work.
    """

    def __init__(self, root: dict[str, Any], effort: Effort) -> None:
        self._root, self._effort = root, effort
        self._definitions: dict[str, Any] = {}
        """Name in the rewritten schema → definition."""
        self._names: dict[str, str] = {}
        """Reference in the given schema → name."""
        self._notes: list[str] = []
        self._passed: dict[str, list[str]] = {}
        """Annotation → paths."""
        self._n_exact = 0
        """Number of conditions around this place: what they exclude or ask for must not become narrower."""

    def rewritten(self) -> dict[str, Any]:
        """The schema.

        Raises
        ------
        MessageError
            Naming the JSON path of what has a wrong value or cannot be enforced.
        """
        made = self._schema(self._root, "$", 0)
        if made is False:
            raise MessageError("The schema excludes every value; correct it.")
        made = {} if made is True else made
        return {**made, "$defs": self._definitions} if self._definitions else made

    @property
    def notes(self) -> tuple[str, ...]:
        """What was ignored or read differently, in sentences."""
        passed = []
        for name, paths in self._passed.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            passed.append(f"{paths[0]}{more}: {name!r} says nothing about which values are valid; it is ignored.")
        return tuple(dict.fromkeys([*passed, *self._notes]))

    # --- one schema ---------------------------------------------------------------------------------------------

    def _schema(self, schema: Any, path: str, depth: int) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise MessageError(f"{path} is {short(schema)}; expected a schema: a mapping, true or false.")
        if depth > MAX_DEPTH:
            raise MessageError(f"{path} is nested more than {MAX_DEPTH} deep; expected a flatter schema.")
        self._effort.spend(1 + len(schema) // 16)
        made = modernized(self._checked(schema, path, depth))
        is_nullable = made.pop("nullable", False)
        self._format(made, path)
        for name in ("if", "not"):
            self._n_exact += 1
            try:
                self._inside(made, name, path, depth)
            finally:
                self._n_exact -= 1
        for name in (
            *("then", "else", "contains", "propertyNames", "dependentSchemas"),
            *("properties", "patternProperties", "additionalProperties", "items", "prefixItems", "allOf"),
        ):
            self._inside(made, name, path, depth)
        for name in ("anyOf", "oneOf"):
            if name in made:
                made[name] = self._branches(made[name], path + step(name), depth)
        if "anyOf" not in made and "oneOf" in made and are_disjoint(made["oneOf"], self._resolved, self._effort):
            made["anyOf"] = made.pop("oneOf")
        if "$ref" in made:
            made["$ref"] = self._reference(made["$ref"], path + step("$ref"), depth)
        changed = self._conditions(made, path)
        return {"anyOf": [changed, {"type": "null"}]} if is_nullable and changed is not True else changed

    def _checked(self, schema: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        """The binding keywords of a schema."""
        made: dict[str, Any] = {}
        for name, value in schema.items():
            where = path + step(name)
            if name == "$id" and depth:
                raise MessageError(
                    f"{where} cannot be enforced: schemas inside a schema cannot have an $id; use $defs."
                )
            if name in KEYWORDS or name in REWRITTEN:
                fits, expected = KEYWORDS.get(name) or REWRITTEN[name]
                if not fits(value):
                    raise MessageError(f"{where} is {short(value)}; expected {expected}.")
                made[name] = copy.copy(value)
            elif name in BINDING:
                raise CannotEnforceError(
                    f"{where} cannot be enforced: the keyword {name[:40]!r} is not supported. Leave it out, or "
                    f"express it with these: {', '.join(KEYWORDS)}."
                )
            elif name not in QUIET:
                meant = None if name.startswith("x-") else meant_word(name)
                if meant is not None:
                    raise MessageError(
                        f"{where} cannot be enforced: there is no keyword {name[:40]!r}; it seems to mean {meant!r}."
                    )
                self._passed.setdefault(name[:40], []).append(where)
        return made

    def _inside(self, made: dict[str, Any], name: str, path: str, depth: int) -> None:
        """Rewrite what a keyword holds: a schema, a list of them, or a mapping to them."""
        if name not in made:
            return
        where, value = path + step(name), made[name]
        if name == "patternProperties":
            for pattern in value:
                check_text(pattern, MAX_PATTERN)
                if why := fault({"type": "string", "pattern": pattern}, self._effort):
                    raise CannotEnforceError(f"{where}{step(pattern)} cannot be enforced: {why}.")
        if name in ("properties", "patternProperties", "dependentSchemas"):
            made[name] = {key: self._schema(item, where + step(key), depth + 1) for key, item in value.items()}
        elif isinstance(value, list):
            made[name] = [self._schema(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        else:
            made[name] = self._schema(value, where, depth + 1)

    def _branches(self, branches: list[Any], path: str, depth: int) -> list[Any]:
        """Alternative branches, without those that cannot be enforced, if others remain."""
        made: list[Any] = []
        fallen: list[CannotEnforceError] = []
        for i, branch in enumerate(branches):
            try:
                made.append(self._schema(branch, f"{path}[{i}]", depth + 1))
            except CannotEnforceError as error:
                fallen.append(error)
        if fallen and (self._n_exact or not any(branch is not False for branch in made)):
            raise fallen[0]
        self._notes += [f"{error} The other branches remain." for error in fallen]
        return made

    def _reference(self, reference: str, where: str, depth: int) -> str:
        """The name of the target of a reference, which is rewritten when it is first referred to."""
        if reference == "#":
            return reference
        if reference not in self._names:
            target = self._target(reference, where)
            name = re.sub(r"\W", "_", reference.rsplit("/", 1)[-1], flags=re.ASCII)
            while name in self._definitions:
                name += "_"
            self._names[reference], self._definitions[name] = name, {}
            try:
                self._definitions[name] = self._schema(target, where, depth + 1)
            except MessageError:
                del self._names[reference], self._definitions[name]
                raise
        return "#/$defs/" + self._names[reference]

    def _target(self, reference: str, where: str) -> Any:
        node: Any = self._root
        for part in unquote(reference[1:]).split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(node):
                node = node[int(key)]
            elif isinstance(node, dict) and key in node:
                node = node[key]
            else:
                raise MessageError(f"{where} is {short(reference)}, which is not in this schema; add it to $defs.")
        if not reference.startswith("#/"):
            raise MessageError(
                f"{where} is {short(reference)}; expected a reference by path, such as '#/$defs/name'."
            )
        return node

    # --- keywords -----------------------------------------------------------------------------------------------

    def _format(self, made: dict[str, Any], path: str) -> None:
        """Enforce a format and a pattern as far as there is an expression for the format."""
        name, where = made.pop("format", None), path + step("format")
        pattern, types = made.get("pattern"), made.get("type", [*TYPES])
        types = types if isinstance(types, list) else [types]
        if pattern is not None:
            check_text(pattern, MAX_PATTERN)
        why = fault({"type": "string", "pattern": pattern}, self._effort) if pattern is not None else ""
        expression = PATTERNS.get(name or "")
        if expression is None and (pattern is None or why) and _fits(made, WHERE_IT_FITS.get(name or "")):
            expression = WHERE_IT_FITS[name or ""]
        if why and (expression or name in BY_GRAMMAR):
            del made["pattern"]
            self._notes.append(f"{path}.pattern cannot be enforced ({why}); the format {name!r} is enforced instead.")
        elif why:
            raise CannotEnforceError(f"{path}.pattern cannot be enforced: {why}.")
        if expression is not None and "pattern" not in made:
            made["pattern"] = expression
        elif expression is not None:
            made["allOf"] = [*made.get("allOf", []), {"pattern": expression}]
        elif name in BY_GRAMMAR:
            made["format"] = BY_GRAMMAR[name]
        elif name in RANGES and "integer" in types and "number" not in types:
            low, high = RANGES[name]
            made["minimum"] = max(made.get("minimum", low), low)
            made["maximum"] = min(made.get("maximum", high), high)
        elif name is not None and "pattern" not in made:
            self._notes.append(f"{where} is {name[:40]!r}, which is not enforced; any value of the type is accepted.")

    def _conditions(self, made: dict[str, Any], path: str) -> Any:
        """Express with other keywords what has no enforced keyword."""
        resolve = self._resolved
        rules: tuple[tuple[str, Callable[[], Any]], ...] = (
            ("propertyNames", lambda: with_property_names(made, made.pop("propertyNames"), resolve)),
            ("contains", lambda: with_contained(made)),
            ("unevaluatedProperties", lambda: unevaluated(made, "unevaluatedProperties", "additionalProperties")),
            ("unevaluatedItems", lambda: unevaluated(made, "unevaluatedItems", "items")),
            ("not", lambda: negated(made, made.pop("not"), resolve)),
            ("dependentRequired", lambda: with_dependents(made)),
            ("dependentSchemas", lambda: with_dependents(made)),
            ("if", lambda: conditional(made, resolve)),
            ("minProperties", lambda: with_property_counts(made)),
            ("maxProperties", lambda: with_property_counts(made)),
        )
        for name in ("minContains", "maxContains"):
            if "contains" not in made:
                made.pop(name, None)
        if "if" not in made or not {"then", "else"} & set(made):
            for name in ("if", "then", "else"):
                made.pop(name, None)
        changed: Any = made
        for name, rule in rules:
            if name not in made:
                continue
            changed = rule()
            if changed is None:
                raise CannotEnforceError(
                    f"{path}{step(name)} cannot be enforced: the keyword {name!r} is supported in simple forms only. "
                    f"Leave it out, or express it with these: {', '.join(KEYWORDS)}."
                )
            if changed is not made:  # the schema is inside another one now
                if any(left in made for left, _ in rules if left != name):
                    raise CannotEnforceError(
                        f"{path}{step(name)} cannot be enforced together with other conditions of its kind."
                    )
                break
        return changed

    def _resolved(self, schema: Any) -> Any:
        """A schema with its references followed, as rewritten."""
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or [*schema] != ["$ref"] or schema["$ref"] == "#":
                break
            schema = self._definitions[schema["$ref"].removeprefix("#/$defs/")]
        return schema


def _fits(made: dict[str, Any], expression: str | None) -> bool:
    """Whether strings that match an expression can have the lengths that a schema asks for."""
    lengths: dict[str, Any] = {name: made[name] for name in ("minLength", "maxLength") if name in made}
    return expression is not None and not fault({"type": "string", "pattern": expression, **lengths})


def step(name: str) -> str:
    """One step of a JSON path."""
    return f".{name}" if name[:1] != "" and name.replace("$", "_").isidentifier() else f"[{name[:40]!r}]"


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "…"
