"""Schemas and vocabularies for llguidance: which tokens may follow, so that an answer is valid JSON of one schema.

Chosen over llama.cpp's grammars: its converter ignores keywords it does not know (multipleOf, limits of numbers,
patternProperties, minProperties, uniqueItems), it refuses long repetitions, and checking 151,748 tokens took it
29 ms, where llguidance takes 0.1 to 0.2. Imported at the first schema, not before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_runtime.errors import MessageError
from edge_runtime.structured_output.compiling import OVERLAPPING, compiled, grammar_text, reason
from edge_runtime.structured_output.effort import Effort, TooMuchWorkError
from edge_runtime.structured_output.json_position import JsonPosition
from edge_runtime.structured_output.places import Place
from edge_runtime.structured_output.schema import DEFAULT_MAX_LENGTH, bound_schema
from edge_runtime.structured_output.shortest_completion import MAX_END, shortest_completion
from edge_runtime.structured_output.vocabulary import GrammarVocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

CULPRIT_S = 1.0
"""Time limit of the search for the part of a schema that is to blame."""
ANY_OBJECT: dict[str, Any] = {"type": "object"}
"""The schema of free JSON."""


class Grammar:
    """A compiled schema.

    Parameters
    ----------
    schema : JSON schema, or None for any JSON object.
    effort : limits the work.

    Raises
    ------
    MessageError
        When the schema cannot be enforced, naming the JSON path, when no value is valid, or when it takes too much
        work to find out.
    """

    def __init__(
        self, schema: Mapping[str, Any] | None, vocabulary: GrammarVocabulary, effort: Effort | None = None
    ) -> None:
        self.vocabulary, self._effort = vocabulary, effort or Effort()
        given = ANY_OBJECT if schema is None else schema
        bounded = bound_schema(given, effort=self._effort)
        self._matcher = self._compile(bounded.text)
        if self._matcher.is_error():  # a pattern may want a longer string than the default bound
            bounded = bound_schema(given, pattern_max_length=DEFAULT_MAX_LENGTH, effort=self._effort)
            self._matcher = self._compile(bounded.text)
        self.notes = bounded.notes
        """What is ignored or read differently in the schema, in sentences."""
        if self._matcher.get_error().startswith(OVERLAPPING):
            self._matcher = self._compile(bounded.text, one_of_is_any_of=True)
            self.notes += (
                "The branches of a oneOf are not seen to exclude one another; it is read as anyOf, so that an answer "
                "may be valid under several of them.",
            )
        if self._matcher.is_error():
            why = reason(self._matcher.get_error())
            raise MessageError(f"{self._culprit(json.loads(bounded.text), why)} cannot be enforced: {why}.")
        self._place = Place.of(bounded.root) if bounded.has_unique_items else None
        shortest = shortest_completion(self._matcher, self.position(), vocabulary, self._effort)
        if shortest is None:
            raise MessageError(
                f"The schema has no answer that ends, or none of at most {MAX_END} tokens; check its references "
                "for endless recursion, how many items and characters it asks for, and whether its patterns and "
                "enums allow as many different keys and unique items as it asks for."
            )
        self.is_open = bounded.is_open
        """Whether the schema does not limit the length of an answer."""
        self.limits_keys = '"patternProperties"' in bounded.text
        """Whether an object may run out of new keys."""
        self.shortest = tuple(shortest)
        """The shortest answer."""
        self.n_shortest = len(shortest)
        """Its number of tokens."""
        self.max_forced = len(shortest) + len(bounded.text)
        """Maximum number of tokens that one token may force: a bracket opens what the schema requires inside."""

    def matcher(self) -> LLMatcher:
        """A new match, before the first token."""
        return self._matcher.deep_copy()

    def position(self) -> JsonPosition:
        """The place before the first byte."""
        return JsonPosition(self._place)

    def _compile(self, schema: str, *, one_of_is_any_of: bool = False) -> LLMatcher:
        grammar = grammar_text(schema, one_of_is_any_of=one_of_is_any_of)
        matcher: LLMatcher = compiled(self.vocabulary.llguidance, grammar, self._effort)
        return matcher

    def _culprit(self, root: dict[str, Any], why: str) -> str:
        """JSON path of the innermost schema that cannot be compiled by itself, for the same reason.

        A large schema has many inner ones: if the search takes too much work, the path is that of an outer one.
        """
        path, schema, self._effort = "$", root, Effort(seconds=CULPRIT_S)
        definitions = {name: root[name] for name in ("$defs",) if name in root}
        while True:
            for step, inner in _inner(schema):
                try:
                    matcher = self._compile(json.dumps({**definitions, **inner}), one_of_is_any_of=True)
                except TooMuchWorkError:
                    return path
                if reason(matcher.get_error()) == why:
                    path, schema = path + step, inner
                    break
            else:
                return path


def _inner(schema: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Schemas directly inside one, with the step of the path that leads there."""
    found: list[tuple[str, Any]] = []
    for name in ("properties", "patternProperties"):
        found += [(f".{name}[{key!r}]", value) for key, value in schema.get(name, {}).items()]
    found += [(f".{name}", schema.get(name)) for name in ("additionalProperties", "items")]
    for name in ("prefixItems", "anyOf", "oneOf", "allOf"):
        found += [(f".{name}[{i}]", value) for i, value in enumerate(schema.get(name, []))]
    return [(step, value) for step, value in found if isinstance(value, dict)]


def allowed_ids(matcher: LLMatcher, n_rows: int) -> npt.NDArray[np.int64]:
    """Tokens that may follow: ndarray [shape=(n,), int64], ascending."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.flatnonzero(np.unpackbits(bits, bitorder="little")[:n_rows])
