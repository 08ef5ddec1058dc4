"""The form that a caller asks for (a schema, JSON, tools) → the form that the scheduler enforces."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from edge_runtime.errors import MessageError
from edge_runtime.inputs.messages import THINK_END
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.structured_output.constraint import DEFAULT_BUDGET, AnswerForm
from edge_runtime.structured_output.effort import Effort
from edge_runtime.structured_output.grammar import Grammar
from edge_runtime.structured_output.tools import (
    TOOL_CALL,
    TOOL_CALL_END,
    call_schema,
    chosen_functions,
    function_names,
)
from edge_runtime.structured_output.vocabulary import GrammarVocabulary

logger = logging.getLogger("edge_runtime")


def choose_form(
    schema: Mapping[str, Any] | None,
    json: bool,
    tools: Sequence[Mapping[str, Any]],
    tool_choice: Any,
    thinking: bool,
    tokenizer: Tokenizer,
    vocabulary: Callable[[], GrammarVocabulary],
    effort: Effort | None = None,
) -> AnswerForm | None:
    """Form of an answer; None if it is free.

    Parameters
    ----------
    thinking : whether the model reasons first; the form starts after that.
    vocabulary : called only if there is something to enforce.
    effort : limits the work for all schemas together.

    Raises
    ------
    MessageError
        When what is asked for cannot be enforced, or takes too much work.
    """
    effort = effort or Effort()
    names = chosen_functions(tools, tool_choice)
    if schema is None and not json and names is None:
        return None
    if thinking and THINK_END not in tokenizer.special_ids:
        raise MessageError(
            f"The vocabulary lacks the token {THINK_END}, so nothing marks where the reasoning ends and the answer "
            "starts; ask without thinking, or use MiniCPM-V 4.5."
        )
    form: AnswerForm | None = None
    if schema is not None or json:  # checked even where a call must be made
        grammar = Grammar(schema, vocabulary(), effort)
        form = AnswerForm(grammar, _budget(grammar))
    if form is None or names is not None:
        form = _call_form(tools, names or [], tokenizer, vocabulary, effort)
    elif tools:
        form = replace(
            form, call=_call_form(tools, function_names(tools), tokenizer, vocabulary, effort, must_call=False)
        )
    _log_notes(form.notes)
    return replace(form, separator=tuple(tokenizer.encode("\n\n")))


def _call_form(
    tools: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    tokenizer: Tokenizer,
    vocabulary: Callable[[], GrammarVocabulary],
    effort: Effort,
    *,
    must_call: bool = True,
) -> AnswerForm:
    missing = [tag for tag in (TOOL_CALL, TOOL_CALL_END) if tag not in tokenizer.special_ids]
    if missing:
        raise MessageError(
            f"The vocabulary lacks the tokens {' and '.join(missing)}, so this model cannot be made to call tools"
            f"{'' if must_call else ' or to answer by a schema where it could call one'}; use MiniCPM-V 4.5, or ask "
            f"without {'tools' if must_call else 'one of the two'}."
        )
    grammar = Grammar(call_schema(tools, names, must_hold=must_call, effort=effort), vocabulary(), effort)
    newline = tokenizer.encode("\n")
    return AnswerForm(
        grammar,
        _budget(grammar),
        before=(tokenizer.special_ids[TOOL_CALL], *newline),
        after=(*newline, tokenizer.special_ids[TOOL_CALL_END]),
    )


def _log_notes(notes: Sequence[str]) -> None:
    for note in notes:
        warn_once(note)


@lru_cache(maxsize=1024)
def warn_once(note: str) -> None:
    """Log a note, once for all requests with the same schema."""
    logger.warning("Schema: %s", note)


def _budget(grammar: Grammar) -> int | None:
    """Token limit of an answer that nothing else bounds; at least twice the shortest answer."""
    return max(DEFAULT_BUDGET, 2 * grammar.n_shortest) if grammar.is_open else None
