"""A schema → the text of an llguidance grammar, or the reason why there is none. Imports llguidance on first use."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from edge_runtime.errors import BackendUnavailable, MessageError
from edge_runtime.structured_output.effort import Effort

OPTIONS: dict[str, Any] = {
    # One blank at most: endless blanks would be valid otherwise.
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
}
LIMITS: dict[str, Any] = {
    "max_lexer_states": 100_000,
    "verbose_errors": False,
}
"""Differences from llguidance's own limits for compiling and for computing one mask (60 ms when exhausted).

A state of its automaton takes 1 to 2 kB, for every answer in progress. Beyond a limit the matcher fails.
"""
OVERLAPPING = "oneOf"
"""Start of llguidance's message when it cannot see that the branches of a oneOf exclude one another."""


def load_llguidance() -> Any:
    """The module.

    Raises
    ------
    BackendUnavailable
        When it is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise BackendUnavailable(
            "llguidance, which enforces schemas, is not installed; install it with 'pip install llguidance'. "
            f"({error})"
        ) from None
    return llguidance


def grammar_text(schema: str, *, one_of_is_any_of: bool = False) -> str:
    """The grammar of a checked and bounded schema.

    Raises
    ------
    MessageError
        When it is nested more deeply than llguidance can read.
    """
    options = {**OPTIONS, "coerce_one_of": one_of_is_any_of}
    try:
        text: str = load_llguidance().LLMatcher.grammar_from_json_schema(schema, overrides=options)
    except ValueError as error:
        raise MessageError(
            f"The schema cannot be read ({str(error)[:100]}); expected fewer nested lists and objects."
        ) from None
    return text


def compiled(tokenizer: Any, grammar: str, effort: Effort) -> Any:
    """A grammar's matcher (llguidance's `LLMatcher`), which may have failed; compiled without the GIL.

    Raises
    ------
    TooMuchWorkError
        When no time is left, or it took too long.
    """
    llguidance = load_llguidance()
    effort.check_time()
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))
    effort.check_time()
    return matcher


def fault(schema: dict[str, Any], effort: Effort | None = None) -> str:
    """Why a schema cannot be compiled, in a few words; empty if it can. Contradictions count as reasons."""
    if effort is not None:
        effort.check_time()
    return _fault(json.dumps(schema, sort_keys=True))


@lru_cache(maxsize=512)
def _fault(schema: str) -> str:
    found: str = load_llguidance().LLMatcher.validate_grammar(grammar_text(schema))
    return reason(found)


def reason(message: str) -> str:
    """The part of llguidance's message that is useful to people."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return ""
    text = f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") else lines[0]
    return text.rstrip(".")[:300]


def too_complex(message: str) -> str:
    """A sentence for an error of llguidance in the middle of a text."""
    return f"The schema is too complex: {reason(message)}. Use fewer branches and properties, and simpler patterns."
