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
from edge_runtime.structured_output.constraint import DEFAULT_BUDGET, AnswerForm, Choose
from edge_runtime.structured_output.effort import AnswerEffort, Effort
from edge_runtime.structured_output.grammar import allowed_ids
from edge_runtime.structured_output.schema_size import MAX_TOGETHER, check_size
from edge_runtime.structured_output.vocabulary import GrammarVocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_CHOICES = 1000
MAX_CHARACTERS = 100_000
"""Characters of a pattern, a grammar, or all choices together."""


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

    def behind(self, text: str) -> TextForm:
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
    given: Mapping[str, Any],
    form: AnswerForm | None,
    has_tools: bool,
    vocabulary: Callable[[], GrammarVocabulary],
    effort: Effort | None = None,
) -> AnswerForm | TextForm | None:
    """Form of an answer: the one that it has already, or that of a text.

    Parameters
    ----------
    given : `choices`, `regex` and `grammar`, None where they are not wanted.
    form : what a schema, JSON or the choice of a tool asks for.
    has_tools : whether the model may call some.
    vocabulary : called only where there is something to enforce.
    effort : what may be done for it.

    Raises
    ------
    MessageError
        When the wishes contradict each other or cannot be enforced.
    """
    wanted = [name for name, value in given.items() if value is not None]
    if not wanted:
        return form
    if len(wanted) > 1 or form is not None or has_tools:
        others = f"{wanted[1]} was given, too" if len(wanted) > 1 else "so was a schema, JSON, or tools"
        raise MessageError(f"{wanted[0]} was given and {others}; expected one of them: an answer has one form.")
    (name,) = wanted
    _check(name, given[name])
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


def _check(name: str, value: Any) -> None:
    texts = value if name == "choices" else [value]
    if (
        not isinstance(texts, list | tuple)
        or not 0 < len(texts) <= MAX_CHOICES
        or not all(isinstance(text, str) and text for text in texts)
    ):
        expected = f"a list of 1 to {MAX_CHOICES} texts" if name == "choices" else "a text"
        raise MessageError(f"{name} is {str(value)[:60]!r}; expected {expected}, not empty.")
    if name != "choices" and any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise MessageError(f"{name} has half of a surrogate pair, which is no character; expected whole ones.")
    if sum(map(len, texts)) > MAX_CHARACTERS:
        raise MessageError(f"{name} has more than {MAX_CHARACTERS} characters, which is the limit.")


def _compile(name: str, value: Any, vocabulary: GrammarVocabulary, effort: Effort) -> LLMatcher:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if name == "choices":
        grammar = LLMatcher.grammar_from_regex("|".join(map(_literal, dict.fromkeys(value))))
    elif name == "regex":
        grammar = LLMatcher.grammar_from_regex(_without_anchors(value))
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


def _literal(text: str) -> str:
    """A pattern that matches a text and nothing else."""
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in clean)


def _without_anchors(pattern: str) -> str:
    """A pattern without `^` and `$` at its ends, which are implied: the whole answer must match."""
    pattern = pattern.removeprefix("^")
    slashes = len(pattern.removesuffix("$")) - len(pattern.removesuffix("$").rstrip("\\"))
    return pattern[:-1] if pattern.endswith("$") and slashes % 2 == 0 else pattern


def _reason(matcher: LLMatcher) -> str:
    """Why a form was not compiled; empty if it was."""
    lines = [line.strip() for line in matcher.get_error().splitlines() if line.strip()]
    return " ".join(lines)[:300].rstrip(".")
