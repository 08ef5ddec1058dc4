"""A model that says what a test wants, when it wants: for what the demo model would not say by itself.

Only the model is replaced; its answers are the runtime's own `AnswerStream`s, fed by a script instead of an engine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from edge_runtime.answers import Answer, AnswerStream
from edge_runtime.engine.events import Event, EventQueue, Finished
from edge_runtime.generation.text_stream import Piece
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.store.find import find_model
from edge_runtime.weights.gguf_file import GGUFFile

Step = Event | Exception | threading.Event
"""An event to send, an error to fail with, or something to wait for."""
TIMES = {"encode": 0.5, "prefill": 0.25, "first_token": 0.8, "decode": 2.0}


def finished(reason: str = "stop", tokens: int = 3) -> Finished:
    """The last event."""
    return Finished(reason, tokens, 0, dict(TIMES))  # type: ignore[arg-type]


class _Running:
    """What `engine.Running` is to an answer."""

    def __init__(self) -> None:
        self.events = EventQueue()
        self.cancelled = threading.Event()
        self.ended = False

    async def next_event_async(self) -> Event:
        event = await self.events.get_async()
        if isinstance(event, Exception):
            raise event
        self.ended = self.ended or isinstance(event, Finished)
        return event

    def cancel(self) -> None:
        if not self.ended and not self.cancelled.is_set():
            self.cancelled.set()
            self.events.put(finished("cancelled", 0))


@cache
def _demo_tokenizer() -> Tokenizer:
    return Tokenizer(GGUFFile(find_model("demo").decoder))


class ScriptedModel:
    """Stands where `Model` does in the registry.

    Parameters
    ----------
    script : steps of every answer; or a function of the submitted messages and options that returns them or raises.
    """

    def __init__(self, script: Iterable[Step] | Callable[..., Iterable[Step]]) -> None:
        self._script = script
        self.name, self.n_ctx, self.load_s, self.n_queries = "scripted", 512, 0.0, 64
        self.tokenizer = _demo_tokenizer()
        self.asked: list[tuple[Any, dict[str, Any]]] = []
        """Messages and options of every call."""
        self.running: list[_Running] = []
        self.closed = threading.Event()

    def submit(self, messages: Any, *, n: int = 1, **options: Any) -> list[AnswerStream]:
        """Answer as scripted."""
        options.pop("on_look", None)
        options.pop("on_check", None)
        look = options.pop("on_image", lambda done, total: None)
        self.asked.append((messages, options))
        look(1, 1)
        steps = [*(self._script(messages, **options) if callable(self._script) else self._script)]
        return [self._answer(steps) for _ in range(n)]

    def _answer(self, steps: list[Step]) -> AnswerStream:
        running = _Running()
        self.running.append(running)

        def play() -> None:
            for step in steps:
                if isinstance(step, threading.Event):
                    step.wait(30)
                elif not running.cancelled.is_set():
                    running.events.put(step)

        threading.Thread(target=play, daemon=True).start()

        def finish(text: str, reasoning: str | None, scores: list[Any], end: Finished) -> Answer:
            times = {"load": 0.0, "image": 0.25, **end.timings_s}
            counts = {"prompt_tokens": 11, "visual_tokens": 0, "cached_tokens": 0, "slices": []}
            return Answer(
                text,
                reasoning,
                end.reason,
                self.name,
                completion_tokens=end.completion_tokens,
                timings_s=times,
                **counts,
            )

        return AnswerStream(running, finish)  # type: ignore[arg-type]

    def check_usable(self) -> None:
        """It is."""

    def close(self) -> None:
        """Note that it was unloaded."""
        self.closed.set()


def say(*texts: str) -> list[Step]:
    """Pieces of an answer, and its end."""
    return [*(Piece(text, "answer") for text in texts), finished()]
