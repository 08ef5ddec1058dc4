"""A schema → the text of a llguidance grammar, and the reason where there is none. Imports llguidance when asked."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from edge_runtime.errors import BackendUnavailable, MessageError
from edge_runtime.structured_output.effort import Effort

OPTIONS: dict[str, Any] = {
    # One blank at most: an answer of blanks would be valid without end.
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
}
LIMITS: dict[str, Any] = {
    "max_lexer_states": 100_000,
    "verbose_errors": False,
}
"""What differs from llguidance's own limits of a compilation and of a look at the vocabulary (60 ms, when used up).

A state of its automaton takes 1 to 2 kB, for every answer that is at work. Beyond a limit the matcher has failed.
"""
OVERLAPPING = "oneOf"
"""How llguidance's message begins when it cannot see that the branches of a oneOf exclude one another."""


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
    """The grammar of a schema that was checked and bounded.

    Raises
    ------
    MessageError
        When it is nested more deeply than its reader goes.
    """
    options = {**OPTIONS, "coerce_one_of": one_of_is_any_of}
    try:
        text: str = load_llguidance().LLMatcher.grammar_from_json_schema(schema, overrides=options)
    except ValueError as error:
        raise MessageError(
            f"The schema cannot be read ({str(error)[:100]}); expected fewer lists and objects inside of each other."
        ) from None
    return text


def compiled(tokenizer: Any, grammar: str, effort: Effort) -> Any:
    """A grammar's matcher (llguidance's `LLMatcher`), which may have failed; compiled without the interpreter's lock.

    Raises
    ------
    TooMuchWorkError
        When there is no time left for it, or it took too long.
    """
    llguidance = load_llguidance()
    effort.look()
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))
    effort.look()
    return matcher


def fault(schema: dict[str, Any], effort: Effort | None = None) -> str:
    """Why a schema cannot be compiled, in a few words; empty if it can. Contradictions are such reasons, too."""
    if effort is not None:
        effort.look()
    return _fault(json.dumps(schema, sort_keys=True))


@lru_cache(maxsize=512)
def _fault(schema: str) -> str:
    found: str = load_llguidance().LLMatcher.validate_grammar(grammar_text(schema))
    return reason(found)


def reason(message: str) -> str:
    """The part of a message of llguidance that tells people something."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return ""
    text = f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") else lines[0]
    return text.rstrip(".")[:300]


def too_complex(message: str) -> str:
    """What an error of llguidance in the middle of a text means, as a sentence."""
    return f"The schema is too complex: {reason(message)}. Use fewer branches and properties, and plainer patterns."
