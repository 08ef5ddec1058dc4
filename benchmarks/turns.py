"""Time to the first token of a second question about a picture against the first: at once and after a restart.

    python benchmarks/turns.py MODEL [--side 1344] [--pause 5] [--repeats 2] [--json FILE]

Four new processes, one after the other: both turns, the second asked at once; both turns as in a chat (`follow_up`),
the second asked after a pause, in which the answer is read ahead; the first turn with an empty cache folder; and the
second turn with that folder. Answers have 16 tokens, the second question at most as many.

In the template, past answers have no think block before them, so the KV cache that wrote an answer is of no use
behind the question: asked at once, the next turn reads the answer again. `read_s` says how long the tokens of each
second turn took, and how many there were.

No round starts that would end after `--most-s` seconds. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in ("converters", "kernels", "."):
    sys.path.insert(0, str(ROOT / folder))

from benchmarks.harness.child import environment  # noqa: E402
from benchmarks.harness.goals import Goal, finish  # noqa: E402

QUESTIONS = ("What is shown in this picture, please?", "And what is behind it?")
TOKENS = 16
MOST_OF_FIRST, MOST_AFTER_RESTART = 5.0, 25.0  # per cent


def turn(model: Any, messages: list[Any], follow_up: bool) -> tuple[dict[str, Any], str]:
    """Ask, and return the measurements and the answer."""
    answer = model.chat(messages, greedy=True, max_tokens=TOKENS, repetition_check=False, follow_up=follow_up)
    facts = {name: getattr(answer, f"{name}_tokens") for name in ("prompt", "visual", "cached")}
    return facts | {"first_token_s": answer.timings_s["first_token"], "timings_s": answer.timings_s}, answer.answer


def child(name: str, side: int, turns: list[int], cache: str | None, said: str, pause: float) -> None:
    """Ask some of the questions in this process and print the measurements."""
    import numpy as np
    from PIL import Image

    from edge_runtime import Model

    noise = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((side, side))
    first = {"role": "user", "content": [picture, QUESTIONS[0]]}
    found: dict[str, Any] = {}
    with Model.load(name, cache_dir=cache, n_ctx=2048) as model:
        for number in turns:
            then = [{"role": "assistant", "content": said}, {"role": "user", "content": QUESTIONS[1]}]
            messages = [first, *then][: 1 if number == 1 else 3]
            found[str(number)], text = turn(model, messages, follow_up=pause > 0 and number == 1)
            said = text if number == 1 else said
            if number == 1:
                time.sleep(pause)
    print(json.dumps({"turns": found, "said": said}))


def run(arguments: list[str]) -> dict[str, Any]:
    """Run this script as a child."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment(None))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(options: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], int]:
    """Run one round; return each turn's measurements, and the bytes in the cache folder."""

    def ask(turns: list[int], folder: str | None = None, said: str = "", pause: float = 0.0) -> dict[str, Any]:
        what = json.dumps({"turns": turns, "cache": folder, "said": said, "pause": pause})
        return run([options.model, "--side", str(options.side), "--child", what])

    with tempfile.TemporaryDirectory() as cache:
        at_once, paused = ask([1, 2])["turns"], ask([1, 2], pause=options.pause)["turns"]
        before = ask([1], cache)
        after = ask([2], cache, before["said"])["turns"]
        n_bytes = sum(path.stat().st_size for path in Path(cache).iterdir())
    rows = {
        "first turn": at_once["1"],
        "second turn, asked at once": at_once["2"],
        "first turn of a chat": paused["1"],
        "second turn, after a pause": paused["2"],
        "first turn, cache folder empty": before["turns"]["1"],
        "second turn after a restart": after["2"],
    }
    return rows, n_bytes


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--side", type=int, default=1344, help="pixels of the square picture")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds between two turns of a chat")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--most-s", type=float, default=450.0)
    parser.add_argument("--json", type=Path, help="write the last line to this file too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.model, options.side, **json.loads(options.child))
        return
    rounds: list[dict[str, dict[str, Any]]] = []
    started, n_bytes = time.perf_counter(), 0
    while len(rounds) < options.repeats:
        if rounds and (time.perf_counter() - started) * (len(rounds) + 1) / len(rounds) > options.most_s:
            break
        rows, n_bytes = measure(options)
        rounds.append(rows)
        print(f"{'':<32}{'first token':>12}{'prompt':>8}{'read':>6}{'in':>9}")
        for what, facts in rows.items():
            n_read, read_s = facts["prompt"] - facts["cached"], facts["timings_s"]["prefill"]
            print(
                f"{what:<32}{facts['first_token_s']:>10.2f} s{facts['prompt']:>8}{n_read:>6}{read_s:>7.2f} s",
                flush=True,
            )
    seconds = {what: median(rows[what]["first_token_s"] for rows in rounds) for what in rounds[0]}
    first = median([seconds[what] for what in seconds if what.startswith("first")])
    shares = {what: 100 * value / first for what, value in seconds.items() if what.startswith("second")}
    result = {
        "scenario": "turns",
        "ours_s": {what: round(value, 4) for what, value in seconds.items()},
        "peers_s": {},
        "per_cent_of_first": {what: round(value, 3) for what, value in shares.items()},
        "read_s": {
            what: [
                [rows[what]["prompt"] - rows[what]["cached"], rows[what]["timings_s"]["prefill"]] for rows in rounds
            ]
            for what in shares
        },
        "pause_s": options.pause,
        "cache_bytes": n_bytes,
        "samples": rounds,
    }
    bounds = {what: MOST_AFTER_RESTART if "restart" in what else MOST_OF_FIRST for what in shares}
    finish(result, [Goal(what, shares[what], bounds[what], " % of the first") for what in shares], options.json)


if __name__ == "__main__":
    main()
