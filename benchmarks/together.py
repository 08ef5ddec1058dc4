"""Eight requests at once against one after another: generated tokens over wall time.

    python benchmarks/together.py MODEL [--requests 8] [--tokens 32] [--repeats 3] [--json FILE]

Prompts are different and have `--tokens` tokens, answers as many. Both ways start cold: the KV cache is emptied
before every run, and one after another before every request. They take turns in one process; medians count, and the
answers of both are compared. With quantised weights llama.cpp's sums depend on how many rows a call has, so of two
tokens that are almost equally probable either may be taken; in float32 all answers are equal, which
`tests/benchmarks/test_engine.py` checks.
At full size a turn takes one or two minutes; none starts after `--most-s` seconds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in ("converters", "kernels", "."):
    sys.path.insert(0, str(ROOT / folder))

from benchmarks.harness.child import Child  # noqa: E402
from benchmarks.harness.goals import Goal, finish  # noqa: E402

TIMES_FASTER = 4.5
WAYS = {"together": True, "one after another": False}


def measure(child: Child, options: argparse.Namespace) -> dict[str, Any]:
    """Take samples of both ways in turns."""
    questions = child.call("prompts", count=options.requests, n_tokens=options.tokens)
    child.call("ask", questions=questions[:1], n_tokens=2, together=False)  # not counted: pages are loaded
    samples: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    started = time.perf_counter()
    for turn in range(options.repeats):
        if turn and (time.perf_counter() - started) * (turn + 1) / turn > options.most_s:
            break
        for way in WAYS if turn % 2 == 0 else reversed(WAYS):
            one = child.call("ask", questions=questions, n_tokens=options.tokens, together=WAYS[way])
            samples[way].append(one)
            rate = one["tokens"] / one["seconds"]
            print(f"{way:<20}{one['tokens']:>5} tokens in {one['seconds']:7.2f} s: {rate:6.2f} tokens/s", flush=True)
    return samples


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each prompt, and of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--most-s", type=float, default=450.0, help="no turn that would end later is begun")
    parser.add_argument("--threads", type=int, help="default: physical cores")
    parser.add_argument("--json", type=Path, help="write the last line to this file too")
    options = parser.parse_args()
    setup = {"model": options.model, "n_ctx": 2048, "threads": options.threads}
    with tempfile.TemporaryDirectory() as logs, Child("benchmarks.peers.whole", setup, Path(logs) / "log") as child:
        child.call("load")
        samples = measure(child, options)
        child.call("close")
    rates = {way: [one["tokens"] / one["seconds"] for one in ones] for way, ones in samples.items()}
    pairs = zip(samples["together"][0]["answers"], samples["one after another"][0]["answers"], strict=True)
    same = sum(one == other for one, other in pairs)
    ratio = median(rates["together"]) / median(rates["one after another"])
    for way, ones in rates.items():
        print(f"{way:<20}median {median(ones):6.2f} tokens/s of {len(ones)}")
    print(f"answers equal: {same} of {options.requests}")
    facts = {
        "scenario": "together",
        "ours_s": {way: round(median(one["seconds"] for one in ones), 3) for way, ones in samples.items()},
        "peers_s": {},
        "tokens_per_s": {way: round(median(ones), 3) for way, ones in rates.items()},
        "ratio": round(ratio, 3),
        "requests": options.requests,
        "tokens": options.tokens,
        "equal_answers": same,
        "samples_s": {way: [round(one["seconds"], 3) for one in ones] for way, ones in samples.items()},
    }
    goal = Goal("together, times the rate of one after another", ratio, TIMES_FASTER, at_least=True)
    finish(facts, [goal], options.json)


if __name__ == "__main__":
    main()
