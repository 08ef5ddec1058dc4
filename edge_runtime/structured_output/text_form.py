"""Answers of a form other than JSON of a schema: one of several texts, a pattern, a grammar.

llguidance says what may follow; the sampler chooses among that. Such an answer ends where its form ends. If it runs
out of tokens before, it is cut, with the finish reason `length`: unlike for JSON (`constraint`), no completion is
searched for.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import MessageError
from edge_runtime.structured_output.compiling import compiled
from edge_runtime.structured_output.constraint import DEFAULT_BUDGET, Choose
from edge_runtime.structured_output.effort import AnswerEffort, Effort
from edge_runtime.structured_output.forced_tokens import forced_tokens
from edge_runtime.structured_output.grammar import allowed_ids
from edge_runtime.structured_output.schema_size import MAX_TOGETHER, check_size
from edge_runtime.structured_output.vocabulary import GrammarVocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher


@dataclass(frozen=True)
class TextForm:
    """What an answer must look like; an alternative to `AnswerForm`."""

    vocabulary: GrammarVocabulary
    start_matcher: LLMatcher
    """Before the first token."""
    separator: tuple[int, ...] = ()
    """Tokens between the reasoning and the answer."""

    def limit_reasoning(self, budget: int | None, n_left: int) -> int:
        """Tokens of reasoning that leave the answer half of all tokens, or what most answers need."""
        most = n_left - min(DEFAULT_BUDGET, n_left // 2)
        return most if budget is None else min(budget, most)

    def continuing(self, text: str) -> TextForm:
        """The form of an answer that continues a text.

        Raises
        ------
        MessageError
            When no answer of this form starts with the text.
        """
        ids, matcher = self.vocabulary(text), self.start_matcher.deep_copy()
        if ids and matcher.try_consume_tokens(ids) < len(ids):
            raise MessageError(
                f"The answer continues the last message, but no text of its form starts with {text[:60]!r}; correct "
                "that message, or leave it out."
            )
        return replace(self, start_matcher=matcher)

    def start(self, *, thinking: bool = False) -> TextConstraint:
        """A new answer, after reasoning or not."""
        return TextConstraint(self, self.separator if thinking else ())


class TextConstraint:
    """One answer in progress; see `TextForm`."""

    shortened = False
    """Always false: an answer that runs out of tokens is cut."""

    def __init__(self, form: TextForm, separator: Sequence[int] = ()) -> None:
        self._vocabulary, self._matcher = form.vocabulary, form.start_matcher.deep_copy()
        self._forced = deque(separator)
        self._effort = AnswerEffort()

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return not self._forced and self._matcher.is_stopped()

    def next_token(self, remaining: int, choose: Choose) -> int:
        """Choose the next token, or an end token; see `Constraint.next_token`."""
        with self._effort.step():
            token = self._next_token(choose)
            self._effort.check_time()
            return token

    def draft(self, n: int) -> list[int]:
        """At most `n` tokens that the form forces, or probably does."""
        if self._forced:
            return [*self._forced][:n]
        return forced_tokens(self._matcher, self._vocabulary, n)

    def _next_token(self, choose: Choose) -> int:
        if self._forced:
            return self._forced.popleft()
        if self.ended:  # the prompt held the whole answer
            return min(self._vocabulary.stop_ids)
        ids = allowed_ids(self._matcher, len(self._vocabulary.continues_number))
        if self._matcher.is_error() or not len(ids):
            raise MessageError(
                "The grammar allows nothing after what was written "
                f"({_reason(self._matcher) or 'no token may follow'}); correct it."
            )
        token = choose(ids)
        if token not in self._vocabulary.stop_ids:
            self._matcher.consume_token(token)
        return token


def choose_text_form(
    given: Mapping[str, Any], vocabulary: Callable[[], GrammarVocabulary], effort: Effort | None = None
) -> TextForm | None:
    """Form of an answer that is a text; None where it is free.

    Parameters
    ----------
    given : the one of `choices`, `regex` and `grammar` that is wanted; see `GenerationOptions.text_forms`.
    vocabulary : called only where there is something to enforce.
    effort : what may be done for it.

    Raises
    ------
    MessageError
        When it cannot be enforced.
    """
    if not given:
        return None
    (name,) = given
    words = vocabulary()
    matcher = _compile(name, given[name], words, effort or Effort())
    reason = _reason(matcher)
    if not reason and not matcher.is_accepting():  # an end token is allowed where nothing else is
        goes_on = bool({*allowed_ids(matcher, len(words.continues_number))} - words.stop_ids)
        reason = _reason(matcher)
        if not goes_on and (not reason or reason.startswith("NoExtension")):
            reason = "no text is of its form"
    if reason:
        raise MessageError(f"{name} cannot be enforced: {reason}.")
    return TextForm(words, matcher, tuple(words("\n\n")))


def _compile(name: str, value: Any, vocabulary: GrammarVocabulary, effort: Effort) -> LLMatcher:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if name == "choices":
        grammar = LLMatcher.grammar_from_regex("|".join(map(literal_pattern, dict.fromkeys(value))))
    elif name == "regex":
        grammar = LLMatcher.grammar_from_regex(without_anchors(value))
    else:
        try:
            grammar = LLMatcher.grammar_from_lark(any_to_lark(value))
            _check_lark(grammar)
        except MessageError:
            raise
        except Exception as error:  # noqa: BLE001 - the converter raises what Python happens to raise
            raise MessageError(
                f"grammar cannot be read as GBNF: {str(error)[:200] or type(error).__name__}."
            ) from None
    matcher: LLMatcher = compiled(vocabulary.llguidance, grammar, effort)
    return matcher


def _check_lark(grammar: str) -> None:
    """Check what llguidance does not limit in a grammar: intersections, and schemas inside."""
    n_and = _IN_QUOTES.sub("", grammar).count("&")
    if n_and >= MAX_TOGETHER:
        raise MessageError(f"grammar has {n_and} intersections (&), expected fewer than {MAX_TOGETHER}; simplify it.")
    for place in re.finditer(r"%json\s*", grammar):
        with suppress(ValueError, RecursionError):  # llguidance refuses what is not JSON
            schema, _ = json.JSONDecoder().raw_decode(grammar, place.end())
            check_size(schema if isinstance(schema, dict) else {})


_IN_QUOTES = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/')


def literal_pattern(text: str) -> str:
    """A pattern that matches a text and nothing else."""
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in clean)


def without_anchors(pattern: str) -> str:
    """A pattern without `^` and `$` at its ends, which are implied: the whole answer must match."""
    pattern = pattern.removeprefix("^")
    slashes = len(pattern.removesuffix("$")) - len(pattern.removesuffix("$").rstrip("\\"))
    return pattern[:-1] if pattern.endswith("$") and slashes % 2 == 0 else pattern


def _reason(matcher: LLMatcher) -> str:
    """Why a form was not compiled; empty if it was."""
    lines = [line.strip() for line in matcher.get_error().splitlines() if line.strip()]
    return " ".join(lines)[:300].rstrip(".")
