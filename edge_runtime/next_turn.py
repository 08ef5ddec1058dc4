"""Prefill the next turn's prompt, as far as it is known when an answer has ended, while the engine is idle.

The template drops the (empty) think block before an answer once it is history, so what the KV cache holds after the
question is useless: the next turn would compute the whole answer again before its first token. It is computed here
instead, while the user reads it, together with what the template puts between turns. Any request ends that at once;
what was computed by then stays in the KV cache.

Knows of templates only that they turn messages into a prompt: what is known is the common prefix of the prompts for
two different next questions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from edge_runtime.answers import Answer
from edge_runtime.decoder.llama_context import common_beginning
from edge_runtime.engine.engine import Engine, Running
from edge_runtime.engine.request import Request
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.inputs.messages import Message, parse_messages
from edge_runtime.pipeline import Prepared
from edge_runtime.prompt.build import Prompt

NEXT_QUESTIONS = ("What", "And how")
"""They start differently: the question comes after their common prefix."""


class NextTurnPrefill:
    """At most one prompt that is computed before it is requested."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._running: Running | None = None  # dropping it would cancel it
        self._lock = threading.Lock()

    def follow(self, prepared: Prepared, request: Request, answer: Answer) -> None:
        """Start computing the prefix of the next turn's prompt, if it is known.

        Parameters
        ----------
        prepared, request, answer : the conversation so far, with its request and answer.
        """
        ended = (
            answer.finish_reason in ("stop", "length") and not request.tools
        )  # calls are followed by their results
        if prepared.with_more is None or not ended:
            return
        try:
            beginning = next_beginning(prepared.with_more, answer)
            prefetch = replace(
                request,
                prompt=beginning,
                groups=[[] for _ in request.groups],  # their pixels can be freed: nothing is encoded for this
                options=replace(request.options, beams=1, max_tokens=0, gives_way=None),
                form=None,
                is_prefetch=True,
            )
            with self._lock:
                self._running = self._engine.prefetch(prefetch)
        except EdgeRuntimeError:
            return  # there is no next turn: too long, or rejected by the template


def next_beginning(with_more: Callable[[list[Message]], Prompt], answer: Answer) -> Prompt:
    """Prefix of the next turn's prompt, whatever the question will be."""
    said = parse_messages([answer.message()])
    first, other = (with_more([*said, *parse_messages(question)]) for question in NEXT_QUESTIONS)
    n = common_beginning(first.ids, other.ids)
    return Prompt("", first.ids[:n], [bound for bound in first.bounds if bound[1] <= n])
