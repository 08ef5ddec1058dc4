"""Conditions of JSON Schema that no grammar has → the same conditions expressed with other keywords.

Every function gets a schema (`made`) whose inner schemas are already rewritten, may change it, and returns its
replacement: the same mapping, another schema, false if nothing is valid, or None if it is not one of the simple forms
that can be expressed otherwise. `resolve` follows references.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from edge_runtime.structured_output.effort import Effort
from edge_runtime.structured_output.keywords import COMBINATORS, TYPES
from edge_runtime.structured_output.places import canonical

Schema = dict[str, Any]
Resolve = Callable[[Any], Any]

MAX_TRIGGERS = 4  # 2 to the power of this many variants of an object
MAX_CONTAINED = 64
MAX_VARIANTS = 128
MAX_EXCLUDED = 500  # characters of strings that are not to be written
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


def modernized(made: Schema) -> Schema:
    """Bring drafts 4 to 7 into the form of 2020-12."""
    for name, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(made.get(name), bool) and made.pop(name) and limit in made:
            made[name] = made.pop(limit)
    rest = made.pop("additionalItems", None)
    if isinstance(made.get("items"), list):
        first = made.pop("items")
        made |= ({"prefixItems": first} if first else {}) | ({"items": rest} if rest is not None else {})
    for name, value in made.pop("dependencies", {}).items():
        kind = "dependentRequired" if isinstance(value, list) else "dependentSchemas"
        made[kind] = {**made.get(kind, {}), name: value}
    made |= {name: int(made[name]) for name in _COUNTS if name in made}
    if isinstance(made.get("not"), dict) and [*made["not"]] == ["not"]:
        _also(made, {"allOf": [made.pop("not")["not"]]})
    if made.get("uniqueItems") is False:
        del made["uniqueItems"]
    return made


def with_property_names(made: Schema, names: Any, resolve: Resolve) -> Any:
    """Express `propertyNames` with patterns or properties."""
    names = resolve(names)
    if names is True or names == {} or names == {"type": "string"}:
        return made
    if names is False:
        return _also(made, {"maxProperties": 0})
    if not set(names) <= {"type", "enum", "const", "pattern", "minLength", "maxLength"} or "format" in names:
        return None
    rest = made.get("additionalProperties", True)
    if "patternProperties" in made or names.get("type", "string") != "string":
        return None
    listed = names.get("enum", [names["const"]] if "const" in names else None)
    if listed is not None and len(names) - ("type" in names) == 1:
        allowed = [name for name in listed if isinstance(name, str)]
        if not made.get("properties") and not made.get("required"):
            any_of_them = "|".join("".join(map(_escaped, name)) for name in allowed)
            made |= {"patternProperties": {f"^(?:{any_of_them})$": rest}, "additionalProperties": False}
            return made if allowed else _also(made, {"maxProperties": 0})
        made["properties"] = {name: made.get("properties", {}).get(name, rest) for name in allowed}
        made["additionalProperties"] = False
        return False if set(made.get("required", [])) - set(allowed) else made
    if listed is not None or made.get("properties") or ("pattern" in names and len(names) - ("type" in names) > 1):
        return None
    low, high = names.get("minLength", 0), names.get("maxLength", "")
    made["patternProperties"] = {names.get("pattern", f"^(?s:.){{{low},{high}}}$"): rest}
    made["additionalProperties"] = False
    return made


@dataclass(frozen=True)
class _Kind:
    """What a branch says about its values, as far as that distinguishes it from others."""

    values: frozenset[str] | None
    """Listed values, in canonical spelling."""
    types: set[str]
    named: dict[str, frozenset[str]]
    """Properties whose values are listed."""
    required: frozenset[str]


def are_disjoint(branches: Sequence[Any], resolve: Resolve, effort: Effort) -> bool:
    """Whether no value can be valid under two of several schemas: by type, by value, or by a property's value."""
    kinds = []
    for branch in map(resolve, branches):
        if branch is True or (isinstance(branch, dict) and not branch):
            return len(branches) < 2
        if isinstance(branch, dict):
            kinds.append(_kind(branch, resolve))
    if _differ_by_one_property(kinds):
        return True
    for one, other in combinations(kinds, 2):
        effort.spend()
        if not _are_disjoint(one, other):
            return False
    return True


def _kind(schema: Schema, resolve: Resolve) -> _Kind:
    named = {name: _values(resolve(inner)) for name, inner in schema.get("properties", {}).items()}
    listed = {name: values for name, values in named.items() if values is not None}
    return _Kind(_values(schema), _types(schema), listed, frozenset(schema.get("required", [])))


def _differ_by_one_property(kinds: Sequence[_Kind]) -> bool:
    """Whether all are objects that differ in one required property; large sets of branches mostly do."""
    if not kinds or any(kind.types != {"object"} for kind in kinds):
        return False
    common = frozenset.intersection(*(kind.required.intersection(kind.named) for kind in kinds))
    listed = ([kind.named[name] for kind in kinds] for name in common)
    return any(sum(map(len, values)) == len(frozenset[str]().union(*values)) for values in listed)


def _are_disjoint(one: _Kind, other: _Kind) -> bool:
    if one.values is not None and other.values is not None:
        return one.values.isdisjoint(other.values)
    if one.types.isdisjoint(other.types):
        return True
    if one.types != {"object"} or other.types != {"object"}:
        return False
    names = (one.required | other.required) & one.named.keys() & other.named.keys()
    return any(one.named[name].isdisjoint(other.named[name]) for name in names)


def _values(schema: Any) -> frozenset[str] | None:
    """The values that a schema lists, in canonical spelling."""
    if not isinstance(schema, dict):
        return None
    listed: list[Any] | None = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return None if listed is None else frozenset(map(_spelled, listed))


def _types(schema: Schema) -> set[str]:
    found = schema.get("type", [*TYPES])
    found = {found} if isinstance(found, str) else {*found}
    return found | {"integer"} if "number" in found else found


def with_contained(made: Schema) -> Any:
    """Apply `contains` to the first items: narrower, as any item would do."""
    contained, least, most = made.pop("contains"), made.pop("minContains", 1), made.pop("maxContains", None)
    if most is not None or least > MAX_CONTAINED:
        return None
    least = int(least)
    first: list[Any] = list(made.get("prefixItems", []))
    for i in range(least):
        own = first[i] if i < len(first) else made.get("items", True)
        wanted = contained if own is True else {"allOf": [own, contained]}
        first[i : i + 1] = [wanted]
    if first:
        made["prefixItems"] = first
    made["minItems"] = max(made.get("minItems", 0), least)
    return made


def unevaluated(made: Schema, name: str, plain: str) -> Any:
    """Replace `unevaluatedProperties` or `unevaluatedItems` by their plain equivalents where nothing is combined."""
    value = made.pop(name)
    if value is True or plain in made:
        return made
    if any(word in made for word in (*COMBINATORS, "if", "dependentSchemas")):
        return None
    made[plain] = value
    return made


def negated(made: Schema, excluded: Any, resolve: Resolve) -> Any:
    """Express `not` of values, of types, of required properties, and of several of these."""
    if isinstance(excluded, dict) and "$ref" in excluded:
        excluded = resolve(excluded)
        if isinstance(excluded, dict) and not {"const", "enum"} & set(excluded):
            return None
    if isinstance(excluded, bool) or not excluded:
        return made if excluded is False else False
    words = set(excluded)
    if words == {"anyOf"}:
        left: Any = made
        for branch in excluded["anyOf"]:
            left = negated(left, branch, resolve) if isinstance(left, dict) else left
        return left
    if words == {"type"}:
        return _without_types(made, excluded["type"])
    if words == {"required"}:
        return _also(made, {"anyOf": [{"properties": {name: False}} for name in excluded["required"]]})
    if words in ({"const"}, {"enum"}, {"const", "type"}, {"enum", "type"}):
        return _without_values(made, excluded.get("enum", [excluded.get("const")]))
    return None


def _also(made: Schema, condition: Schema) -> Schema:
    made["allOf"] = [*made.get("allOf", []), condition]
    return made


def _without_types(made: Schema, names: Any) -> Any:
    names, types = ([found] if isinstance(found, str) else found for found in (names, made.get("type", [*TYPES])))
    if "integer" in names and "number" not in names:
        return None if {"integer", "number"} & {*types} else made
    if "number" in names:
        names = [*names, "integer"]
    made["type"] = [name for name in types if name not in names]
    return made if made["type"] else False


def _without_values(made: Schema, values: Sequence[Any]) -> Any:
    listed = made.get("enum", [made["const"]] if "const" in made else None)
    if listed is not None:
        excluded = frozenset(map(_spelled, values))
        rest = [value for value in listed if _spelled(value) not in excluded]
        made.pop("const", None)
        made["enum"] = rest
        return made if rest else False
    texts = {value for value in values if isinstance(value, str)}
    if any(isinstance(value, list | dict) for value in values) or sum(map(len, texts)) > MAX_EXCLUDED:
        return None
    for value in values:
        if value is None:
            _also(made, {"type": [name for name in TYPES if name != "null"]})
        elif isinstance(value, bool):
            _also(made, {"anyOf": [{"const": not value}, {"type": [name for name in TYPES if name != "boolean"]}]})
        elif not isinstance(value, str):
            _also(made, {"anyOf": [{"exclusiveMaximum": value}, {"exclusiveMinimum": value}]})
    if texts:
        condition = {"pattern": f"^{_none_of(texts)}$"}
        made = _also(made, condition) if "pattern" in made or "format" in made else {**made, **condition}
    return made


def _none_of(texts: set[str]) -> str:
    """Regular expression, without look-around, for all strings except these."""
    heads = sorted({text[0] for text in texts if text})
    others = f"[^{''.join(map(_escaped, heads))}](?s:.)*" if heads else "(?s:.)+"
    parts = [others] if "" in texts else ["", others]
    parts += [_escaped(head) + _none_of({text[1:] for text in texts if text.startswith(head)}) for head in heads]
    return f"(?:{'|'.join(parts)})"


def _escaped(character: str) -> str:
    return f"\\x{{{ord(character):x}}}"


def _spelled(value: Any) -> str:
    """Canonical spelling of a value."""
    return canonical(json.dumps(value).encode())


def with_dependents(made: Schema) -> Any:
    """Express `dependentRequired` and `dependentSchemas` as variants of the object: with the property and without."""
    names: dict[str, list[str]] = made.pop("dependentRequired", {})
    schemas: dict[str, Any] = made.pop("dependentSchemas", {})
    required = set(made.get("required", []))
    triggers = [name for name in {**names, **schemas} if names.get(name) != []]
    open_ones = [name for name in triggers if name not in required]
    if len(open_ones) > MAX_TRIGGERS:
        return None
    variants = []
    for chosen in product((True, False), repeat=len(open_ones)):
        present = {name: True for name in triggers if name in required} | dict(zip(open_ones, chosen, strict=True))
        wanted, absent = set(required), [name for name, is_there in present.items() if not is_there]
        conditions = [*made.get("allOf", [])]
        for name, is_there in present.items():
            if is_there:
                wanted |= {name, *names.get(name, [])}
                conditions += [schemas[name]] if name in schemas else []
        if wanted.isdisjoint(absent):
            variants.append(_variant(made, wanted, dict.fromkeys(absent, False), conditions))
    return variants[0] if len(variants) == 1 else {"anyOf": variants}


def _variant(made: Schema, required: set[str], properties: Mapping[str, Any], conditions: Sequence[Any]) -> Schema:
    variant = {**made, "required": sorted(required)}
    variant["properties"] = {**made.get("properties", {}), **properties}
    for name in required - set(variant["properties"]):
        if made.get("additionalProperties") is not False and "patternProperties" not in made:
            variant["properties"][name] = made.get("additionalProperties", True)
    if conditions:
        variant["allOf"] = [*conditions]
    return variant


def with_property_counts(made: Schema) -> Any:
    """Express `minProperties` and `maxProperties` with optional names as variants, one per set of present names.

    Narrower: only the named properties, if they are enough. The grammar counts by itself if all names are required,
    or none is given.
    """
    named, required = made.get("properties", {}), [*dict.fromkeys(made.get("required", []))]
    low, high = int(made.get("minProperties", 0)), made.get("maxProperties")
    optional = [name for name, inner in named.items() if name not in required and inner is not False]
    if not optional or "patternProperties" in made or not set(required) <= set(named):
        return made
    high = len(required) + len(optional) if high is None else int(high)
    least, most = max(0, low - len(required)), min(high - len(required), len(optional))
    if most < 0:
        return False
    if least > most:
        return False if made.get("additionalProperties") is False else None
    if math.comb(len(optional), most) * math.comb(most, least) > MAX_VARIANTS:
        return None
    for name in ("minProperties", "maxProperties"):
        made.pop(name, None)
    rest, variants = {**made, "additionalProperties": False}, []
    for left in combinations(optional, most):
        for first in combinations(left, least):
            # The first names that are present: those between them are absent, so that no object has two variants.
            skipped = left[: left.index(first[-1]) + 1] if first else ()
            absent = [name for name in optional if name not in left or (name in skipped and name not in first)]
            variants.append(_variant(rest, {*required, *first}, dict.fromkeys(absent, False), made.get("allOf", [])))
    return variants[0] if len(variants) == 1 else {"anyOf": variants}


def conditional(made: Schema, resolve: Resolve) -> Any:
    """Express `if`, `then`, `else` as variants, if the condition is about an object's properties."""
    condition, then, other = resolve(made.pop("if")), made.pop("then", True), made.pop("else", True)
    if isinstance(condition, bool) or not condition:
        return _also(made, {"allOf": [then if condition is not False else other]})
    if not set(condition) <= {"properties", "required", "type"} or condition.get("type", "object") != "object":
        return None
    named, wanted = condition.get("properties", {}), condition.get("required", [])
    required, own = {*made.get("required", [])}, made.get("properties", {})
    combined = [*made.get("allOf", [])]
    matching = {"properties": named, "required": wanted}
    variants = [_variant(made, required | {*wanted}, {}, [*combined, matching, then])]
    for name, match in named.items():
        domain = resolve(own.get(name, True))
        is_listed = isinstance(domain, dict) and not {"enum", "const"}.isdisjoint(domain)
        rest = negated(dict(domain) if is_listed else {}, match, resolve)
        if rest is None:
            return None
        if rest is not False:
            variants.append(_variant(made, required | {name}, {}, [*combined, {"properties": {name: rest}}, other]))
    variants += [
        _variant(made, required, {name: False}, [*combined, other]) for name in wanted if name not in required
    ]
    return {"anyOf": variants}
