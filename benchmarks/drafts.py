"""Answers with guessed tokens against the same answers without, at a set share of right guesses.

    python benchmarks/drafts.py MODEL [--tokens 64] [--shares 0 50 80 100] [--repeats 2] [--json FILE]

Random weights say nothing that can be guessed, so a teacher chooses every token, after the same work: a sampler has
run, and its choice is replaced. Guesses are the teacher's tokens, each wrong with a set probability. How many are
checked is the engine's choice. Beside it an answer of a schema with ten fields, where the form alone guesses, and a
page of 400 words of which its text layer has 97 % (`expected_text`). Sides take turns in one process, medians count,
all samples are kept. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in ("converters", "kernels", "."):
    sys.path.insert(0, str(ROOT / folder))

from benchmarks.harness.goals import Goal, finish  # noqa: E402
from edge_runtime import Model  # noqa: E402
from edge_runtime.engine import drafts as engine_drafts  # noqa: E402
from edge_runtime.generation.drafts import Draft  # noqa: E402
from edge_runtime.generation.sampling import Sampler  # noqa: E402

TIMES = {0: 0.97, 50: 1.4, 80: 2.3, 100: 4.5}
"""Goals by share of right guesses in per cent."""
TIMES_SCHEMA, TIMES_PAGE = 1.5, 2.5
WORDS = ("the", "invoice", "of", "our", "office", "lists", "paper", "and", "ink", "for", "seven", "rooms", "with",
         "a", "price", "each", "them", "in", "euros")  # fmt: skip
FIELDS = ("invoice_number", "customer_name", "order_date", "due_date", "currency_code", "net_amount", "tax_amount",
          "total_amount", "payment_terms", "bank_account")  # fmt: skip


class Teacher:
    """Replaces what samplers choose."""

    def __init__(self) -> None:
        self.tokens: Sequence[int] = ()
        self._at = 0

    def begin(self, tokens: Sequence[int]) -> None:
        """Say these tokens in the next answer."""
        self.tokens, self._at = tokens, 0

    def install(self) -> None:
        """Take the place of all samplers of this process."""
        sample, choose, teacher = Sampler.sample, Sampler.choose, self

        def taught_sample(sampler: Sampler, decoder: Any, row: int) -> int:
            sample(sampler, decoder, row)
            return teacher.next_token()

        def taught_choice(sampler: Sampler, ids: Any, logits: Any) -> int:
            choose(sampler, ids, logits)
            return teacher.next_token()

        Sampler.sample, Sampler.choose = taught_sample, taught_choice  # type: ignore[method-assign]

    def next_token(self) -> int:
        """The next one."""
        self._at += 1
        return self.tokens[min(self._at, len(self.tokens)) - 1]


class Guesses:
    """The teacher's next tokens, each right with a given probability."""

    share = 1.0
    tokens: Sequence[int] = ()

    def __init__(self) -> None:
        self._draw, self._first = random.Random(1), -1

    def propose(self, keys: Sequence[Any], n: int) -> Draft | None:
        """Guess what follows."""
        self._first = len(keys) - 1 if self._first < 0 else self._first
        at = len(keys) - self._first
        found = [token if self._draw.random() < self.share else token ^ 1 for token in self.tokens[at : at + n]]
        return Draft("benchmark", found) if found else None


def answer_s(model: Model, teacher: Teacher, tokens: Sequence[int], **options: Any) -> dict[str, Any]:
    """Have an answer said; seconds of its tokens after the first, and what was guessed."""
    teacher.begin(tokens)
    question = f"Say it. {random.random()}"
    found = model.chat(
        question, temperature=1.0, max_tokens=len(tokens), repetition_check=False, reuse=False, **options
    )
    return {"seconds": found.timings_s["decode"], "tokens": found.completion_tokens, "drafts": found.drafts}


def changed(text: str, share: float) -> str:
    """A text in which some words are others."""
    draw = random.Random(2)
    return " ".join("other" if draw.random() < share else word for word in text.split())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--shares", type=int, nargs="*", default=[*TIMES], help="per cent of guesses that are right")
    parser.add_argument("--words", type=int, default=400, help="of the page")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write the last line to this file too")
    options = parser.parse_args()
    draw, teacher = random.Random(0), Teacher()
    teacher.install()
    own_text = engine_drafts.OwnText
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with Model.load(options.model, n_ctx=4096, n_threads=options.threads) as model:
        encode = model.tokenizer.encode

        def take(name: str, tokens: Sequence[int], **more: Any) -> None:
            """One sample of both sides."""
            both = samples.setdefault(name, {"guessed": [], "plain": []})
            for side in both:
                both[side].append(
                    answer_s(model, teacher, tokens, **more, drafts="auto" if side == "guessed" else "off")
                )
                one = both[side][-1]
                print(
                    f"{name:<14}{side:<9}{one['tokens']:>5} tokens {one['seconds']:8.2f} s  {one['drafts']}",
                    flush=True,
                )

        numbers = encode(" ".join(draw.choice(WORDS) for _ in range(options.tokens)))[: options.tokens]
        values = {name: str(draw.randrange(10, 99)) for name in FIELDS}
        form = {name: {"type": "string", "maxLength": 8} for name in FIELDS}
        schema = {"type": "object", "properties": form, "required": [*FIELDS], "additionalProperties": False}
        said = encode(json.dumps(values, separators=(",", ":")))
        page = " ".join(
            draw.choice(WORDS) + (str(draw.randrange(99)) if draw.random() < 0.3 else "")
            for _ in range(options.words)
        )
        for _ in range(options.repeats):
            for share in options.shares:
                Guesses.share, Guesses.tokens = share / 100, numbers
                engine_drafts.OwnText = Guesses  # type: ignore[assignment,misc]
                take(f"{share} % right", numbers)
            engine_drafts.OwnText = own_text  # type: ignore[misc]
            take("schema", said, schema=schema)
            if options.words:
                take("page", encode(changed(page, 0.03)), expected_text=page)
        rates = {
            name: {side: median(one["tokens"] / one["seconds"] for one in ones) for side, ones in both.items()}
            for name, both in samples.items()
        }
        costs = model.engine.scheduler.planner.drafts.costs
        rows = {n: round(costs.seconds(n), 4) for n in (1, 2, 3, 4, 6, 8, 12, 16)}
    ratios = {name: both["guessed"] / both["plain"] for name, both in rates.items()}
    wanted = {
        **{f"{share} % right": times for share, times in TIMES.items()},
        "schema": TIMES_SCHEMA,
        "page": TIMES_PAGE,
    }
    goals = [
        Goal(f"{name}, times the rate without", ratios[name], bound, at_least=True)
        for name, bound in wanted.items()
        if name in ratios
    ]
    facts = {
        "scenario": "drafts",
        "ours_s": {},
        "peers_s": {},
        "tokens_per_s": rates,
        "ratios": ratios,
        "step_s": rows,
    }
    finish(facts | {"samples": samples}, goals, options.json)


if __name__ == "__main__":
    main()
