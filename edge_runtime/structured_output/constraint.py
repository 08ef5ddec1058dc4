"""An answer that must be JSON of a schema: which token comes next, and how the answer ends in time.

The grammar says what may follow, and the sampler chooses among that. Before the tokens run out, the answer is
completed with the fewest tokens that the grammar allows, so it is always whole JSON if that fits at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edge_runtime.errors import MessageError
from edge_runtime.structured_output.compiling import too_complex
from edge_runtime.structured_output.effort import AnswerEffort, TooMuchWorkError
from edge_runtime.structured_output.forced_tokens import forced_tokens
from edge_runtime.structured_output.grammar import Grammar, allowed_ids
from edge_runtime.structured_output.json_position import without_blanks
from edge_runtime.structured_output.shortest_completion import has_new_item, has_new_key, is_end, shortest_completion

DEFAULT_BUDGET = 1024
"""Token limit of an answer whose schema does not limit its length; more where it requires more."""
CHECK_EVERY = 32  # tokens between two searches for the shortest completion, while the limit is far

Ids = npt.NDArray[np.int64]
Choose = Callable[[Ids], int]


@dataclass(frozen=True)
class AnswerForm:
    """What an answer must look like, from its first token after the reasoning to its last."""

    grammar: Grammar
    budget: int | None = None
    """Tokens after which the answer is completed; None: as many as the request allows."""
    before: tuple[int, ...] = ()
    """Tokens before the JSON text."""
    after: tuple[int, ...] = ()
    """Tokens after the JSON text."""
    separator: tuple[int, ...] = ()
    """Tokens between the reasoning and the answer."""
    call: AnswerForm | None = None
    """What the answer may be instead, recognised by its first token: a tool call."""
    begun: tuple[int, ...] = ()
    """Start of the JSON text, if the prompt already holds it."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What is ignored or read differently in the schemas, in sentences."""
        return (*self.grammar.notes, *(self.call.notes if self.call is not None else ()))

    @property
    def n_shortest(self) -> int:
        """Tokens of the shortest answer, including those around the JSON text."""
        own = len(self.before) + self.grammar.n_shortest + len(self.after)
        return own if self.call is None else max(own, self.call.n_shortest)

    def limit_reasoning(self, budget: int | None, n_left: int) -> int:
        """Tokens of reasoning that leave enough for the answer: its budget, or half of all tokens if that is less.

        The shortest answer always gets its tokens, as long as it fits at all.

        Parameters
        ----------
        budget : tokens of reasoning that were asked for; None: no limit.
        n_left : tokens for reasoning and answer together.
        """
        least = 1 + len(self.separator) + self.n_shortest  # 1: the token that ends the reasoning
        most = max(0, n_left - max(least, min(self.budget or DEFAULT_BUDGET, n_left // 2)))
        return most if budget is None else min(budget, most)

    def continuing(self, text: str) -> AnswerForm:
        """The form of an answer that continues a text.

        Blanks between the parts of its JSON are not matched. A call starts on a new line after it.

        Raises
        ------
        MessageError
            When no answer of this form starts with the text.
        """
        if not text:
            return self
        if self.before:
            newline = self.before[1:]
            return self if text.endswith("\n") else replace(self, before=(*newline, *self.before))
        ids = self.grammar.vocabulary(without_blanks(text))
        matcher, position = self.grammar.matcher(), self.grammar.position()
        if not ids or (matcher.try_consume_tokens(ids) == len(ids) and position.feed(self._bytes(ids))):
            return replace(self, begun=tuple(ids), call=None if ids else self.call)
        raise MessageError(
            f"The answer continues the last message, but no JSON of its form starts with {text[:60]!r}; correct that "
            "message, or leave it out."
        )

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.grammar.vocabulary.token_bytes[i] for i in ids)

    def start(self, *, thinking: bool = False) -> Constraint:
        """A new answer, after reasoning or not."""
        return Constraint(self, self.separator if thinking else ())


class Constraint:
    """One answer in progress; see `AnswerForm`."""

    def __init__(self, form: AnswerForm, separator: Sequence[int] = ()) -> None:
        self._forced = deque(separator)
        self._known_completion: list[int] = []
        """While nothing is written yet: the shortest answer."""
        self._take(form)
        self._call = form.call
        """While it is open whether the answer is a call."""
        self._is_complete = False
        """Whether only forced tokens are to come."""
        self._completion: list[int] | None = None
        """Once the limit is near: the shortest completion, which still fits."""
        self._search_at: int | None = None
        """With so many tokens left the shortest completion is searched for next; None: at once."""
        self.shortened = False
        """Whether the answer was cut short because tokens ran out."""
        self._effort = AnswerEffort()
        if form.begun:
            self._matcher.consume_tokens([*form.begun])
            self._position.feed(b"".join(self._vocabulary.token_bytes[i] for i in form.begun))
            self._known_completion = []
            self._end_if_complete()

    def _take(self, form: AnswerForm) -> None:
        self._grammar, self._vocabulary, self._after = form.grammar, form.grammar.vocabulary, form.after
        self._forced.extend(form.before)
        self._left = form.budget
        self._matcher, self._position = form.grammar.matcher(), form.grammar.position()
        self._known_completion = [*form.grammar.shortest]

    @property
    def ended(self) -> bool:
        """Whether the answer is complete; nothing may follow then."""
        return self._is_complete and not self._forced

    def next_token(self, remaining: int, choose: Choose) -> int:
        """Choose the next token, or an end token.

        Parameters
        ----------
        remaining : tokens that the answer may still have, this one included.
        choose : picks one of the token ids it is given: ndarray [shape=(n,), int64].

        Raises
        ------
        MessageError
            When the schema turns out to be too complex, or to take too much work (`TooMuchWorkError`).
        """
        with self._effort.step():
            return self._next_token(remaining, choose)

    def draft(self, n: int) -> list[int]:
        """At most `n` tokens that the form forces, or probably does."""
        if self._forced or self._is_complete:
            return [*self._forced][:n]
        return [] if self._call is not None else forced_tokens(self._matcher, self._vocabulary, n)

    def _next_token(self, remaining: int, choose: Choose) -> int:
        if self.ended:  # the prompt held the whole answer
            return min(self._vocabulary.stop_ids)
        if self._call is not None and not self._forced:
            call, self._call = self._call, None
            if self._is_call(call, remaining, choose):
                self._take(call)
        wanted = remaining if self._left is None else min(remaining, self._left)
        if self._left is not None:
            self._left -= 1
        if not self._forced:
            token = self._choose(wanted - len(self._after), remaining - len(self._after), choose)
            if token is not None:
                return token
        return self._forced.popleft() if self._forced else min(self._vocabulary.stop_ids)

    def _is_call(self, call: AnswerForm, remaining: int, choose: Choose) -> bool:
        """Whether a call starts here instead of the answer itself."""
        if call.n_shortest > remaining:
            return False
        ids = allowed_ids(self._matcher, len(self._vocabulary.continues_number))
        return choose(np.sort(np.append(ids, call.before[0]))) == call.before[0]

    def _choose(self, wanted: int, remaining: int, choose: Choose) -> int | None:
        """A token that the grammar allows; None when the answer must be completed instead.

        Parameters
        ----------
        wanted, remaining : tokens that the answer should, and can, still have.
        """
        completion = self._near_completion(wanted, remaining)
        if completion is not None and len(completion) >= wanted:
            self._close(completion)
            return None
        try:
            token = self._sampled(choose)
            if token in self._vocabulary.stop_ids:
                return token
            rest = self._completion_after(token, completion) if completion is not None else None
        except TooMuchWorkError:
            if completion is None:
                raise
            rest = None
        if completion is not None:
            if rest is None or len(rest) >= wanted:
                self._close(completion)  # after this token no completion would fit, or be found: it is not taken
                return None
            self._completion = rest
        self._end_if_complete()
        return token

    def _end_if_complete(self) -> None:
        if self._matcher.is_stopped():
            self._forced.extend(self._after)
            self._is_complete = True

    def _sampled(self, choose: Choose) -> int:
        """A token that the sampler chooses among those that the grammar allows; accepted unless an end token."""
        ids = allowed_ids(self._matcher, len(self._vocabulary.continues_number))
        if self._matcher.is_error():
            raise MessageError(too_complex(self._matcher.get_error()))
        for group in self._preferred(ids):
            while len(group):
                token = choose(group)
                if token in self._vocabulary.stop_ids or self._accept(token):
                    return token
                group = group[group != token]
        raise MessageError(
            "The schema asks for more different keys, or more different items of an array, than it allows; "
            "correct it."
        )

    def _accept(self, token: int) -> bool:
        """Move over a token; false, without moving, if an object would get a key, or an array an item, twice."""
        position = self._position.copy()
        if not position.feed(self._vocabulary.token_bytes[token]):
            return False
        if not self._matcher.consume_token(token):
            raise MessageError(too_complex(self._matcher.get_error()))
        place = (self._matcher, position, self._vocabulary, self._effort)
        runs_out = self._grammar.limits_keys and position.is_at_key
        if (position.may_repeat and not has_new_item(*place)) or (runs_out and not has_new_key(*place)):
            self._matcher.rollback(1)
            return False
        self._position = position
        return True

    def _near_completion(self, wanted: int, remaining: int) -> list[int] | None:
        """The shortest completion, if the limit is so near that it must be known; None also if it does not fit."""
        if self._completion is None and (self._search_at is None or wanted <= self._search_at):
            known, self._known_completion = self._known_completion, []
            completion = known or shortest_completion(self._matcher, self._position, self._vocabulary, self._effort)
            self._search_at = wanted - CHECK_EVERY
            if completion is not None and len(completion) <= remaining:
                near = len(completion) + self._grammar.max_forced
                if wanted <= near:
                    self._completion = completion
                else:
                    self._search_at = max(near, self._search_at)
        return self._completion

    def _completion_after(self, token: int, completion: list[int]) -> list[int] | None:
        """The shortest completion after a token that was just accepted; inside a string it mostly stays the same."""
        if completion[:1] == [token]:
            return completion[1:]
        if is_end(completion, self._matcher, self._position, self._vocabulary):
            return completion
        return shortest_completion(self._matcher, self._position, self._vocabulary, self._effort)

    def _close(self, completion: Sequence[int]) -> None:
        self._forced.extend([*completion, *self._after])
        self._is_complete = self.shortened = True

    def _preferred(self, ids: Ids) -> list[Ids]:
        """Tokens in groups, preferred ones first: those that lengthen a long number or key come last."""
        if self._position.number_is_long:
            is_late = self._vocabulary.continues_number[ids]
        elif self._position.key_is_long:
            is_late = ~self._vocabulary.starts_with_quote[ids]
        else:
            return [ids]
        return [ids[~is_late], ids[is_late]]
