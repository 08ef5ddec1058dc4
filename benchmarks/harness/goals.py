"""Results beside their goals: one line for people, and the JSON object that ends every benchmark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Goal:
    """A number and its bound."""

    what: str
    value: float
    bound: float
    unit: str = ""
    at_least: bool = False
    """Whether the number must be at least the bound; otherwise it must stay under it."""

    @property
    def is_met(self) -> bool:
        """Whether the goal is reached."""
        return self.value >= self.bound if self.at_least else self.value < self.bound

    def __str__(self) -> str:
        sign = "at least" if self.at_least else "under"
        verdict = "met" if self.is_met else "MISSED"
        return f"{self.what}: {self.value:.3g}{self.unit} (goal: {sign} {self.bound:g}{self.unit}) {verdict}"

    def facts(self) -> dict[str, Any]:
        """Fields for the JSON object."""
        return {"what": self.what, "value": round(self.value, 5), "bound": self.bound, "met": self.is_met}


def finish(facts: dict[str, Any], goals: Sequence[Goal], path: Path | None) -> None:
    """Print each goal's verdict, then the result as one JSON object, which also goes to `path` if there is one.

    It names the processor, too.
    """
    from edge_kernels.machine import cpu_name, isa

    for goal in goals:
        print(goal)
    facts = {"cpu": cpu_name(), "kernels": isa()} | facts | {"goals": [goal.facts() for goal in goals]}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    print(json.dumps(facts))
