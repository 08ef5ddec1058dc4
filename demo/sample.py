"""The generator's output: pictures, a question, the right answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class Mark:
    """Something small in a picture that patches can learn to name; lengths are fractions of the picture's."""

    code: int
    """See `batches.PATCH_HEADS`."""
    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Sample:
    """Pictures, a question and its answer."""

    kind: str
    pictures: list[Image.Image]
    question: str
    answer: str
    temporal_ids: list[int] | None = None
    """Times of the frames of one group; None for still pictures."""
    earlier: tuple[str, str] | None = None
    """Question and answer of the previous turn, in which the pictures were shown."""
    facts: dict[str, list[int]] = field(default_factory=dict)
    """Labels for auxiliary heads, see `batches.HEADS`."""
    marks: dict[str, list[Mark]] = field(default_factory=dict)
    """Head → marks in the first picture."""

    def messages(self) -> list[dict[str, object]]:
        """The conversation as `Model.chat` takes it."""
        first = [*self.pictures, self.earlier[0] if self.earlier else self.question]
        turns: list[dict[str, object]] = [{"role": "user", "content": first}]
        if self.earlier:
            turns += [{"role": "assistant", "content": self.earlier[1]}, {"role": "user", "content": self.question}]
        return turns

    def options(self) -> dict[str, object]:
        """Options for `Model.chat`: those of the official recipe for video frames."""
        if self.temporal_ids is None:
            return {}
        return {"temporal_ids": [self.temporal_ids], "use_image_id": False, "max_slices": 1}


def pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    """One of `items`."""
    return items[int(rng.integers(len(items)))]
