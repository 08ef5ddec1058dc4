"""What a token costs outside llama.cpp, how fast loading is, and llama-bench's rate beside ours.

    python benchmarks/decode.py MODEL [--llama-bench FILE] [--tokens 64] [--repeats 3] [--json FILE]

- Load to ready: new processes, files in the page cache, `Model.load` alone (imports are reported separately).
- Per token: wall time between two calls of llama_decode (sampling with the default settings, detokenising, planning,
  handing over), and inside them, both measured in one process while it answers; the share is of their sum.
- llama-bench generates as many tokens in turns with ours, with as many threads and, like ours, weights not repacked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in ("converters", "kernels", "."):
    sys.path.insert(0, str(ROOT / folder))

from benchmarks.harness.child import Child, environment  # noqa: E402
from benchmarks.harness.goals import Goal, finish  # noqa: E402
from edge_runtime.store.find import find_model  # noqa: E402

MOST_LOAD_S, MOST_SHARE = 2.0, 3.0
MODULE = "benchmarks.peers.whole"


def read_through(files: list[Path]) -> None:
    """Bring files into the page cache."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(64 << 20):
                pass


def loads(setup: dict[str, Any], repeats: int, log: Path) -> list[dict[str, float]]:
    """Load in new processes; the first is not counted."""
    found = []
    for _ in range(repeats + 1):
        with Child(MODULE, setup, log) as child:
            found.append(child.call("load"))
            child.call("close")
    return found[1:]


def llama_bench(program: Path, decoder: Path, n_tokens: int, threads: int) -> float:
    """Tokens per second that llama-bench generates."""
    command = [program, "-m", decoder, "-p", 0, "-n", n_tokens, "-r", 1, "-t", threads, "--repack", 0, "-o", "json"]
    done = subprocess.run(
        [str(part) for part in command], env=environment(threads), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{program.name} ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    rates: list[dict[str, Any]] = json.loads(done.stdout[done.stdout.index("[") :])
    return float(next(one["avg_ts"] for one in rates if one["n_gen"] == n_tokens))


def generate(setup: dict[str, Any], options: argparse.Namespace, decoder: Path, log: Path) -> dict[str, Any]:
    """Generate tokens with ours and llama-bench in turns."""
    ours: list[dict[str, Any]] = []
    peer: list[float] = []
    with Child(MODULE, setup, log) as child:
        child.call("load")
        child.call("token", n_tokens=2)  # not counted: pages come in, the tokenizer is built
        for _ in range(options.repeats):
            ours.append(child.call("token", n_tokens=options.tokens))
            if options.llama_bench is not None:
                peer.append(llama_bench(options.llama_bench, decoder, options.tokens, options.threads))
        child.call("close")
    return {"ours": ours, "peer": peer}


def share(sample: dict[str, Any]) -> float:
    """Per cent of a step's wall time spent outside llama_decode."""
    outside = sum(sample["outside_s"])
    return float(100 * outside / (outside + sum(sample["inside_s"])))


def main() -> None:
    """Command line."""
    from edge_kernels.machine import cpu_count

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's program, to have its rate beside ours")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cpu_count(), help="default: physical cores")
    parser.add_argument("--json", type=Path, help="write the last line to this file too")
    options = parser.parse_args()
    paths = find_model(options.model, None)
    setup = {"model": options.model, "n_ctx": 2048, "threads": options.threads}
    read_through([paths.decoder, paths.mmproj])
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        loaded = loads(setup, options.repeats, log)
        found = generate(setup, options, paths.decoder, log)
    load_s = median(one["load_s"] for one in loaded)
    print(f"load to ready {load_s:.2f} s, imports before it {median(one['import_s'] for one in loaded):.2f} s")
    steps = {
        part: [seconds for sample in found["ours"] for seconds in sample[f"{part}_s"]]
        for part in ("inside", "outside")
    }
    for part, seconds in steps.items():
        middle, most = 1000 * median(seconds), 1000 * max(seconds)
        print(f"{part:<8} llama_decode: median {middle:8.2f} ms per token, most {most:.2f}")
    rate = median(len(sample["inside_s"]) / sample["answer_s"] for sample in found["ours"])
    print(
        f"generation {rate:.2f} tokens/s"
        + "".join(f"; llama-bench {median(found['peer']):.2f}" for _ in found["peer"][:1])
    )
    ours_share = median(share(sample) for sample in found["ours"])
    facts = {
        "scenario": "decode",
        "ours_s": {
            "load": round(load_s, 4),
            "token": round(1 / rate, 5),
            "outside": round(median(steps["outside"]), 6),
        },
        "peers_s": {"llama-bench": round(1 / median(found["peer"]), 5)} if found["peer"] else {},
        "tokens_per_s": round(rate, 3),
        "llama_bench_tokens_per_s": found["peer"],
        "outside_per_cent": round(ours_share, 3),
        "threads": options.threads,
        "samples": {"load": loaded, "token": found["ours"]},
    }
    goals = [
        Goal("load to ready", load_s, MOST_LOAD_S, " s"),
        Goal("outside llama_decode", ours_share, MOST_SHARE, " % of a step"),
    ]
    finish(facts, goals, options.json)


if __name__ == "__main__":
    main()
