"""Time to the first token for a large picture, and memory: ours against llama.cpp's program, both cold.

    python benchmarks/first_token.py MODEL LLAMA_MTMD_CLI [--side 1344] [--repeats 2] [--json FILE]

Every sample is a new process that loads the model, reads a PNG and answers; the clock runs from the start of the
process to its first byte on stdout. Files are in the page cache and our kernels compiled, as for a user's second
question of the day. Ours is `edge-runtime run` with one token; llama-mtmd-cli writes its first byte once the prompt
is computed, just before the token. Both have the same files, threads and context, and take turns. Peak RSS is the
kernel's own high-water mark (VmHWM). llama.cpp runs with its defaults; if its repacked weights crash the process, it
runs with --no-repack, and the result says so.
"""

from __future__ import annotations

import argparse
import contextlib
import os
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

from benchmarks.decode import read_through  # noqa: E402
from benchmarks.harness.child import Peak, environment  # noqa: E402
from benchmarks.harness.goals import Goal, finish  # noqa: E402
from edge_runtime.store.find import ModelPaths, find_model  # noqa: E402

TIMES_FASTER = {"avx2": 2.4, "avx512vnni": 4.0, "amx": 6.6}
"""Goal of a picture of LARGE pixels a side, by instruction set."""
LARGE, MOST_RSS_GB = 1344, 6.3
QUESTION = "What is shown in this picture, please?"
CONTEXT = 2048


class Failed(Exception):  # noqa: N818 - another way may work
    """A process that ended without output."""


def first_word(command: list[Any], threads: int, log: Path) -> dict[str, float]:
    """Run a command; return the seconds to its first byte on stdout, and its peak memory.

    Raises
    ------
    Failed
        When it prints nothing; with the end of its stderr.
    """
    with log.open("w+", encoding="utf-8", errors="replace") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.PIPE, stderr=errors, env=environment(threads)
        )
        assert process.stdout is not None
        try:
            with Peak(process.pid) as memory:
                said = os.read(process.stdout.fileno(), 1)
                seconds = time.perf_counter() - started
                process.stdout.read()
            process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
            process.stdout.close()
        if not said or process.returncode:
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:] or ["nothing"]
            raise Failed(f"it ended with {process.returncode}; last line: {last[0][:300]}")
    return {"seconds": seconds, "rss": memory.peak.high_water, "anon": memory.peak.anon}


def commands(paths: ModelPaths, options: argparse.Namespace, picture: Path) -> dict[str, list[list[Any]]]:
    """Commands that start each side; the first that works is used."""
    peer = [options.llama_mtmd_cli, "-m", paths.decoder, "--mmproj", paths.mmproj, "--image", picture, "-p", QUESTION]
    peer += ["-n", 1, "-t", options.threads, "-c", CONTEXT, "--temp", 0]
    ours = [sys.executable, "-m", "edge_runtime", "run", "-m", options.model, picture, QUESTION, "--greedy"]
    ours += ["--max-tokens", 1, "--ctx", CONTEXT, "--threads", options.threads]
    return {"edge-runtime": [ours], "llama-mtmd-cli": [peer, [*peer, "--no-repack"]]}


def measure(ways: dict[str, list[list[Any]]], options: argparse.Namespace, log: Path) -> dict[str, Any]:
    """Take samples of both sides in turns."""
    samples: dict[str, list[dict[str, float]]] = {side: [] for side in ways}
    told: dict[str, list[str]] = {side: [] for side in ways}
    started = time.perf_counter()
    for turn in range(options.repeats):
        if turn and (time.perf_counter() - started) * (turn + 1) / turn > options.most_s:
            break
        for side, tries in ways.items():
            while True:
                try:
                    one = first_word(tries[0], options.threads, log)
                    break
                except Failed as error:
                    told[side].append(f"{tries.pop(0)[-1]}: {error}")
                    print(f"{side}: {told[side][-1]}", flush=True)
                    if not tries:
                        raise SystemExit(f"{side} cannot be measured.") from None
            samples[side].append(one)
            print(f"{side:<16}{one['seconds']:8.2f} s, peak RSS {one['rss'] / 1e9:5.2f} GB", flush=True)
    return {"samples": samples, "failed": told, "repacked_peer": "--no-repack" not in ways["llama-mtmd-cli"][0]}


def make_picture(path: Path, side: int) -> None:
    """A picture of smooth noise."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (max(1, side // 8), max(1, side // 8), 3), dtype=np.uint8)
    Image.fromarray(noise).resize((side, side)).save(path)


def main() -> None:
    """Command line."""
    from edge_kernels.machine import cpu_count, isa

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("llama_mtmd_cli", type=Path)
    parser.add_argument("--side", type=int, default=1344, help="pixels of the square picture")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--most-s", type=float, default=420.0, help="no turn that would end later is begun")
    parser.add_argument("--threads", type=int, default=cpu_count(), help="default: physical cores")
    parser.add_argument("--json", type=Path, help="write the last line to this file too")
    options = parser.parse_args()
    paths = find_model(options.model, None)
    read_through([paths.decoder, paths.mmproj])
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        make_picture(picture, options.side)
        small, log = Path(folder) / "small.png", Path(folder) / "log"
        make_picture(small, 56)
        first_word(commands(paths, options, small)["edge-runtime"][0], options.threads, log)  # compiles, not counted
        found = measure(commands(paths, options, picture), options, log)
    samples = found["samples"]
    seconds = {side: median(one["seconds"] for one in ones) for side, ones in samples.items()}
    rss = {side: max(one["rss"] for one in ones) for side, ones in samples.items()}
    ratio = seconds["llama-mtmd-cli"] / seconds["edge-runtime"]
    for side in samples:
        print(f"{side:<16}median {seconds[side]:8.2f} s, most RSS {rss[side] / 1e9:5.2f} GB")
    facts = {
        "scenario": "first_token",
        "ours_s": {"first_token": round(seconds["edge-runtime"], 3)},
        "peers_s": {"llama-mtmd-cli": round(seconds["llama-mtmd-cli"], 3)},
        "ratio": round(ratio, 3),
        "peak_rss_bytes": rss,
        "picture": [options.side, options.side],
        "threads": options.threads,
        **found,
    }
    goals = [Goal("peak RSS", rss["edge-runtime"] / 1e9, MOST_RSS_GB, " GB")]
    if options.side == LARGE and isa() in TIMES_FASTER:
        bound = TIMES_FASTER[isa()]
        goals.insert(0, Goal("first token, times faster than llama-mtmd-cli", ratio, bound, at_least=True))
    finish(facts, goals, options.json)


if __name__ == "__main__":
    main()
