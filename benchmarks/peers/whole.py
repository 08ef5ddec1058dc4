"""Our whole model in a process of its own: loading, one or many requests at once, where a token's time goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from benchmarks.harness.child import serve

WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "it",
    "was",
    "for",
    "on",
    "are",
    "with",
    "as",
    "at",
    "be",
    "by",
)


@dataclass
class Calls:
    """llama.cpp's library with a clock around its one call that computes."""

    library: Any
    spans: list[tuple[float, float]] = field(default_factory=list)
    """Start and end of each call, in seconds."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)

    def llama_decode(self, context: Any, batch: Any) -> int:
        """Make the call, and wait for what it may have left to compute."""
        started = time.perf_counter()
        status: int = self.library.llama_decode(context, batch)
        self.library.llama_synchronize(context)
        self.spans.append((started, time.perf_counter()))
        return status


class Whole:
    """A decoder file and an mmproj file. Options: model, threads, n_ctx."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def load(self) -> dict[str, float]:
        """Import and load; both in seconds. A running program waits for the latter only."""
        started = time.perf_counter()
        from edge_runtime import Model

        imported = time.perf_counter()
        self.model = Model.load(
            self._options["model"], n_ctx=self._options.get("n_ctx"), n_threads=self._options.get("threads")
        )
        return {"import_s": imported - started, "load_s": time.perf_counter() - imported}

    def forget(self) -> None:
        """Empty the KV cache and the cache of visual tokens."""
        decoder, scheduler = self.model.engine.decoder, self.model.engine.scheduler

        def empty() -> None:
            for sequence in range(decoder.n_sequences + 1):
                decoder.rewind(sequence)
            scheduler.encoding.visual_tokens = type(scheduler.encoding.visual_tokens)()
            self.model.engine.encoder.forget_slices()

        self.model.engine.run(empty)

    def prompts(self, count: int, n_tokens: int) -> list[str]:
        """Different questions with prompts of `n_tokens` tokens each, template included."""
        return [prompt_of(self.model, number, n_tokens) for number in range(count)]

    def ask(self, questions: Sequence[str], n_tokens: int, together: bool) -> dict[str, Any]:
        """Answer all questions, at once or one after the other, with empty caches.

        Returns
        -------
        facts : `seconds` from the first question to the last answer, `tokens` generated, the `answers`.
        """
        options: dict[str, Any] = {"greedy": True, "max_tokens": n_tokens, "repetition_check": False}
        # Random weights may end an answer at any token.
        options["logit_bias"] = dict.fromkeys(self.model.tokenizer.stop_ids, -100.0)
        self.forget()
        seconds, answers = 0.0, []
        if together:
            started = time.perf_counter()
            streams = [self.model.chat(question, stream=True, **options) for question in questions]
            answers = [stream.result() for stream in streams]
            seconds = time.perf_counter() - started
        else:
            for question in questions:
                started = time.perf_counter()
                answers.append(self.model.chat(question, **options))
                seconds += time.perf_counter() - started
                self.forget()
        return {
            "seconds": seconds,
            "tokens": sum(answer.completion_tokens for answer in answers),
            "cached": sum(answer.cached_tokens for answer in answers),
            "answers": [answer.answer for answer in answers],
        }

    def token(self, n_tokens: int) -> dict[str, Any]:
        """Measure where the time of generated tokens goes: inside llama_decode, and between two calls of it.

        Sampling has its default settings, and the answer is streamed to a reader, as in a real program.

        Returns
        -------
        facts : `inside_s` and `outside_s`, one per token; `answer_s` from the first to the last piece.
        """
        decoder = self.model.engine.decoder
        calls = Calls(decoder._lib)
        decoder._lib = calls
        try:
            options = {"logit_bias": dict.fromkeys(self.model.tokenizer.stop_ids, -100.0), "seed": 1}
            stream = self.model.chat("Tell me something.", stream=True, max_tokens=n_tokens + 1, **options)
            moments = [time.perf_counter() for _ in stream]
        finally:
            decoder._lib = calls.library
        steps = calls.spans[-(n_tokens + 1) :]  # the first of them computes the end of the prompt
        inside = [end - start for start, end in steps[1:]]
        outside = [start - before for (_, before), (start, _) in pairwise(steps)]
        return {"inside_s": inside, "outside_s": outside, "answer_s": moments[-1] - moments[0]}

    def close(self) -> None:
        """Free the model."""
        self.model.close()


def prompt_of(model: Any, number: int, n_tokens: int) -> str:
    """A question of words, and of single letters where a word is too long; questions differ from their first word.

    Raises
    ------
    RuntimeError
        When the template alone is longer.
    """
    text, at = str(number), number
    while (n := len(model.build_prompt(text).ids)) < n_tokens:
        longer = f"{text} {WORDS[at % len(WORDS)]}"
        text, at = (longer, at + 1) if len(model.build_prompt(longer).ids) <= n_tokens else (f"{text}.", at)
        if len(model.build_prompt(text).ids) == n:  # dots may merge into one token
            text = f"{text}{'?!,;'[len(text) % 4]}"
    if n > n_tokens:
        raise RuntimeError(f"the shortest prompt has {n} tokens, wanted {n_tokens}")
    return text


if __name__ == "__main__":
    serve(Whole)
