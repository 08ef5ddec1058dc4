"""The second question about a picture beside the first: time to the first token, in one process and after a restart.

    python benchmarks/turns.py MODEL [--side 1344] [--json FILE]

Three processes, one after the other: both turns in one process; the first turn with a cache folder, empty before;
and, with that folder, the second turn in a new process. Answers have 16 tokens, the second question as many at most.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

QUESTIONS = ("What is shown in this picture, please?", "And what is behind it?")
TOKENS = 16


def turn(model: Any, messages: list[Any]) -> tuple[dict[str, Any], str]:
    """Ask, and return what is to be compared."""
    answer = model.chat(messages, greedy=True, max_tokens=TOKENS, repetition_check=False)
    facts = {name: getattr(answer, f"{name}_tokens") for name in ("prompt", "visual", "cached")}
    return facts | {"first_token_s": answer.timings_s["first_token"], "timings_s": answer.timings_s}, answer.answer


def child(name: str, side: int, turns: list[int], cache: str | None, said: str) -> None:
    """Ask some of the questions in this process and print what they took."""
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
            found[str(number)], text = turn(model, [first, *then][: 1 if number == 1 else 3])
            said = text if number == 1 else said
    print(json.dumps({"turns": found, "said": said}))


def run(arguments: list[str]) -> dict[str, Any]:
    """Run this script as a child."""
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--side", type=int, default=1344, help="pixels of the square picture")
    parser.add_argument("--json", type=Path, help="write the last line to this file too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.model, arguments.side, **json.loads(arguments.child))
        return
    with tempfile.TemporaryDirectory() as cache:

        def ask(turns: list[int], folder: str | None, said: str = "") -> dict[str, Any]:
            what = json.dumps({"turns": turns, "cache": folder, "said": said})
            return run([arguments.model, "--side", str(arguments.side), "--child", what])

        together = ask([1, 2], None)["turns"]
        before = ask([1], cache)
        after = ask([2], cache, before["said"])["turns"]
        n_bytes = sum(path.stat().st_size for path in Path(cache).iterdir())
    rows = {
        "first turn": together["1"],
        "second turn": together["2"],
        "first turn, cache folder empty": before["turns"]["1"],
        "second turn after a restart": after["2"],
    }
    print(f"{'':<32}{'first token':>12}{'prompt':>8}{'cached':>8}")
    for what, facts in rows.items():
        print(f"{what:<32}{facts['first_token_s']:>10.2f} s{facts['prompt']:>8}{facts['cached']:>8}")
    seconds = {what: facts["first_token_s"] for what, facts in rows.items()}
    facts = {
        "scenario": "turns",
        "ours_s": seconds,
        "peers_s": {},
        "second_of_first": round(seconds["second turn"] / seconds["first turn"], 4),
        "restarted_of_first": round(seconds["second turn after a restart"] / seconds["first turn"], 4),
        "cache_bytes": n_bytes,
        "samples": rows,
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(facts) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
