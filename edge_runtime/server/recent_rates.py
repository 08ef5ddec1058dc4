"""How fast the last answers came: what tells a processor that is throttled, which counters since the start hide.

Answers enter as they end; rates over the last `KEPT` of each model leave. Answers that ran beside others are slower,
so a drop under an even load is what to look for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from edge_runtime.answers import Answer

KEPT = 8
MIN_PROMPT_TOKENS = 32
"""A shorter prompt takes one pass over the weights, however short it is: its rate would say nothing."""


@dataclass
class Rate:
    """Work done and its seconds, for the last answers that had any."""

    _samples: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=KEPT))

    def add(self, amount: int, seconds: float) -> None:
        """Count an answer's share, if there was one."""
        if amount > 0 and seconds > 0:
            self._samples.append((amount, seconds))

    @property
    def per_second(self) -> float | None:
        """Amount per second; None before the first sample."""
        if not self._samples:
            return None
        return sum(amount for amount, _ in self._samples) / sum(seconds for _, seconds in self._samples)


@dataclass
class Rates:
    """Those of one model."""

    prefill: Rate = field(default_factory=Rate)
    decode: Rate = field(default_factory=Rate)
    slices: Rate = field(default_factory=Rate)

    def record(self, answer: Answer, *, counts_prompt: bool) -> None:
        """Count an answer.

        Parameters
        ----------
        counts_prompt : False for all but one of the answers that share a prompt.
        """
        timings = answer.timings_s
        if counts_prompt:
            computed = answer.prompt_tokens - answer.cached_tokens
            self.prefill.add(computed * (computed >= MIN_PROMPT_TOKENS), timings.get("prefill", 0.0))
            self.slices.add(answer.encoded_slices, timings.get("encode", 0.0))
        self.decode.add(answer.completion_tokens - 1, timings.get("decode", 0.0))  # the first came with the prompt

    def gauges(self) -> Iterator[tuple[str, float]]:
        """Name and value of every rate that is known."""
        per_slice = self.slices.per_second
        for name, value in (
            ("prefill_tokens_per_second", self.prefill.per_second),
            ("decode_tokens_per_second", self.decode.per_second),
            ("seconds_per_slice", None if per_slice is None else 1 / per_slice),
        ):
            if value is not None:
                yield name, value


WHAT = {
    "prefill_tokens_per_second": "Prompt tokens computed per second, over the last answers.",
    "decode_tokens_per_second": "Tokens generated per second, over the last answers.",
    "seconds_per_slice": "Seconds to encode a slice of a picture, over the last answers.",
}
"""What each gauge tells."""
