"""Measure a converted demo model through `edge_runtime`, as the package itself answers.

    python demo/evaluate.py --model FOLDER --samples 500 --json result.json

Samples are held out: strings (of three or more characters) that training excludes and, for "unseen fonts", fonts and
hues that it excludes, too. An answer counts if it equals the right one, character for character; decoding is greedy.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.data import CORE, KINDS
from demo.sample import Sample
from demo.things import DIRECTIONS
from edge_runtime import Model

SEED = 20_260
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}

GOALS = {
    "text to 4": 0.97,
    "text to 6": 0.90,
    "unseen fonts": 0.85,
    "slices": 0.90,
    "shape": 0.98,
    "count": 0.90,
    "filter": 0.80,
    "video": 0.98,
}
AT_MOST = {"video reversed": 0.10, "video shuffled": 0.65}


@dataclass
class Score:
    """Right answers of one skill."""

    right: int = 0
    asked: int = 0
    details: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    """Finer heading → [right, asked]."""
    wrong: list[list[str]] = field(default_factory=list)
    """The first wrong answers: question, right answer, given answer."""

    def add(self, sample: Sample, given: str, heading: str) -> None:
        """Count one answer."""
        right = given == sample.answer
        self.right += right
        self.asked += 1
        self.details[heading][0] += right
        self.details[heading][1] += 1
        if not right and len(self.wrong) < 12:
            self.wrong.append([sample.question, sample.answer, given])

    @property
    def share(self) -> float:
        """Share of right answers."""
        return self.right / max(1, self.asked)

    @property
    def error(self) -> float:
        """Standard error of the share."""
        return math.sqrt(self.share * (1 - self.share) / max(1, self.asked))


def draw(kind: str, number: int) -> Sample:
    """Held-out sample of a kind; its seeds are not those of training."""
    return KINDS[kind](np.random.default_rng([SEED, list(KINDS).index(kind), number]))


def reverse_times(sample: Sample, rng: np.random.Generator) -> Sample:
    """The same frames with their times reversed."""
    assert sample.temporal_ids is not None
    return replace(sample, temporal_ids=sample.temporal_ids[::-1])


def shuffle_times(sample: Sample, rng: np.random.Generator) -> Sample:
    """The same frames with their times in random order."""
    return replace(sample, temporal_ids=[int(t) for t in rng.permutation(sample.temporal_ids)])


CHANGES: dict[str, Callable[[Sample, np.random.Generator], Sample]] = {
    "video reversed": reverse_times,
    "video shuffled": shuffle_times,
}
"""Skill → change made to the video samples."""


def heading(kind: str, sample: Sample) -> str:
    """Heading that a sample counts under in the details."""
    if sample.kind == "text":
        return f"{len(sample.answer)} characters"
    if sample.temporal_ids is not None:
        return f"{len(sample.temporal_ids)} frames"
    if "count" in kind or kind == "filter":
        return sample.answer
    return sample.answer if sample.answer in DIRECTIONS else "all"


def ask(model: Model, sample: Sample) -> str:
    """The model's greedy answer."""
    return str(model.chat(sample.messages(), greedy=True, max_tokens=24, **sample.options()))


def measure(model: Model, kind: str, count: int) -> Score:
    """Ask `count` samples of one skill."""
    score, change = Score(), CHANGES.get(kind)
    for number in range(count):
        sample = draw("video" if change else kind, number)
        if change:
            sample = change(sample, np.random.default_rng([SEED, number]))
        score.add(sample, ask(model, sample), heading(kind, sample))
    return score


def as_json(kind: str, score: Score) -> dict[str, Any]:
    """One entry of the result."""
    return {
        "share": round(score.share, 4),
        "standard_error": round(score.error, 4),
        "samples": score.asked,
        "goal": GOALS.get(kind),
        "at_most": AT_MOST.get(kind),
        "details": {name: [*counts] for name, counts in sorted(score.details.items())},
        "wrong": score.wrong,
    }


def verdict(kind: str, score: Score) -> str:
    """Goal, and whether it is met."""
    if kind in GOALS:
        return f">= {GOALS[kind]:.0%}  {'met' if score.share >= GOALS[kind] else 'missed'}"
    if kind in AT_MOST:
        return f"<= {AT_MOST[kind]:.0%}  {'met' if score.share <= AT_MOST[kind] else 'missed'}"
    return ""


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="demo", help="folder with decoder and mmproj file")
    parser.add_argument("--samples", type=int, default=500, help="per core skill")
    parser.add_argument("--further", type=int, help="samples per further skill; default a fifth")
    parser.add_argument("--kinds", nargs="*", help="skills to measure; default all")
    parser.add_argument("--exact", action="store_true", help="float activations and KV cache, as --exact of run")
    parser.add_argument("--threads", type=int, help="default: as the runtime chooses")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    further = options.samples // 5 if options.further is None else options.further
    result: dict[str, Any] = {"model": Path(options.model).name, "seed": SEED, "skills": {}}
    started = time.perf_counter()
    with Model.load(options.model, exact=options.exact, n_threads=options.threads) as model:
        for kind in options.kinds or [*CORE, *CHANGES, *(k for k in KINDS if k not in CORE)]:
            score = measure(model, kind, options.samples if kind in CORE or kind in CHANGES else further)
            result["skills"][kind] = as_json(kind, score)
            print(
                f"{kind:<16}{score.share:7.1%} ± {score.error:.1%}  n={score.asked:<5}{verdict(kind, score)}",
                flush=True,
            )
    core = [result["skills"][kind]["share"] for kind in CORE if kind in result["skills"]]
    result["core_average"] = round(float(np.mean(core)), 4) if core else None
    result["seconds"] = round(time.perf_counter() - started, 1)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), "utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "skills"}))


if __name__ == "__main__":
    main()
