"""The next turn's prompt, as far as it is known when an answer has ended: prefill while nobody waits.

The template drops the (empty) think block in front of an answer once it is history, so the KV cache that wrote the
answer is of no use behind the question: the next turn would compute the whole answer again before its first token. It
is computed here instead, while the person reads it, together with what the template puts between turns. Whoever asks
for anything ends that at once; what was computed until then stays in the KV cache.

Knows of templates only that they make a beginning out of messages: it is what two different next questions share.
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
"""They begin differently: behind what they share stands the question."""


class NextTurnPrefill:
    """At most one prompt that is computed before it is asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._running: Running | None = None  # forgotten, it would be cancelled
        self._lock = threading.Lock()

    def follow(self, prepared: Prepared, request: Request, answer: Answer) -> None:
        """Begin to compute what the next turn's prompt will begin with; nothing where that is not known.

        Parameters
        ----------
        prepared, request, answer : the conversation so far, as it was asked and answered.
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
                groups=[[] for _ in request.groups],  # their pixels need not stay: nothing is encoded for this
                options=replace(request.options, beams=1, max_tokens=0),
                form=None,
                is_prefetch=True,
            )
            with self._lock:
                self._running = self._engine.prefetch(prefetch)
        except EdgeRuntimeError:
            return  # a conversation without a next turn: too long, or nothing that the template takes


def next_beginning(with_more: Callable[[list[Message]], Prompt], answer: Answer) -> Prompt:
    """What the prompt of the next turn begins with, whatever the question will be."""
    said = parse_messages([answer.message()])
    first, other = (with_more([*said, *parse_messages(question)]) for question in NEXT_QUESTIONS)
    n = common_beginning(first.ids, other.ids)
    return Prompt("", first.ids[:n], [bound for bound in first.bounds if bound[1] <= n])
