"""Whether `--low-memory` answers about a large picture inside a control group with little memory and no swap.

    python benchmarks/low_memory.py models/minicpm-v --limit 5.6 --json benchmarks/results/low_memory.json

A process that loads the model and answers about a picture of 1344 x 1344 is put into a new group with that limit.
Its RSS and anonymous memory are sampled and reported by stage, with the kernel's own peak of RSS and of the group.
Before it starts, the model's pages are dropped from the page cache, so that the group pays for every page that it
reads; pages of libraries that other processes have read already are in RSS, but not in the group's usage.

Needs Linux, and the right to make control groups (root). `--limit 0` makes no group. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in (".", "kernels"):
    sys.path.insert(0, str(ROOT / folder))

from benchmarks.harness.memory import Memory, measure  # noqa: E402

PERIOD_S = 0.02
SIDE = 1344  # pixels; ten slices at full size
CGROUP = Path("/sys/fs/cgroup")
NAME = "edge-runtime-low-memory"


def drop_pages(model: Path) -> None:
    """Drop the pages of a model's files from the page cache; those that other processes have mapped stay."""
    for path in model.glob("*.gguf"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def limited_group(limit: int) -> Iterator[Path]:
    """Make a control group with that limit and no swap, of the version that the machine has; remove it afterwards."""
    first = (CGROUP / "memory" / "memory.limit_in_bytes").exists()
    group = CGROUP / ("memory" if first else "") / f"{NAME}-{os.getpid()}"
    group.mkdir()
    try:
        if first:
            (group / "memory.limit_in_bytes").write_text(str(limit))
            (group / "memory.swappiness").write_text("0")
        else:
            (CGROUP / "cgroup.subtree_control").write_text("+memory")
            (group / "memory.max").write_text(str(limit))
            (group / "memory.swap.max").write_text("0")
        yield group
    finally:
        group.rmdir()


def facts_of(group: Path) -> dict[str, int]:
    """What the kernel counted: the group's peak, and how often it had to give pages back or to read them again."""
    found: dict[str, int] = {}
    for name, files in {
        "peak_bytes": ("memory.max_usage_in_bytes", "memory.peak"),
        "times_at_the_limit": ("memory.failcnt",),
    }.items():
        for file in files:
            with contextlib.suppress(OSError, ValueError):
                found[name] = int((group / file).read_text())
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    found["major_faults"] = int(stat.get("pgmajfault", 0))
    found["refaults"] = int(stat.get("workingset_refault_file", 0))
    return found


def run(model: Path, limit: int, options: dict[str, Any]) -> dict[str, Any]:
    """Answer once in a child process; returns peaks by stage, timings and what the group counted."""
    drop_pages(model)
    with limited_group(limit) if limit else contextlib.nullcontext() as group:

        def enter() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels"))}
        command = [sys.executable, __file__, str(model), "--child", json.dumps(options)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=enter) as child:
            facts = _watch(child)
        if child.returncode:
            raise SystemExit(f"the answer failed with exit code {child.returncode} (-9: killed for memory)")
        return facts | {"group": None if group is None else facts_of(group)}


def _watch(child: subprocess.Popen[str]) -> dict[str, Any]:
    """Sample a child's memory until it ends; it prints the name of each stage as it begins, and last an object."""
    stages: dict[str, Memory] = {"start": Memory()}
    last: list[dict[str, Any]] = [{}]

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("{"):
                last[0] = json.loads(line)
            else:
                stages.setdefault(line.strip(), Memory())

    reader = threading.Thread(target=read)
    reader.start()
    high_water = 0
    while child.poll() is None:
        now, peak = measure(child.pid), [*stages.values()][-1]
        for name, value in asdict(now).items():
            setattr(peak, name, max(getattr(peak, name), value))
        high_water = max(high_water, now.high_water)
        time.sleep(PERIOD_S)
    reader.join()
    return {
        "stages": {
            name: {key: getattr(peak, key) for key in ("rss", "anon", "file")} for name, peak in stages.items()
        },
        "peak_rss": high_water,
        "peak_anon": max(peak.anon for peak in stages.values()),
        **last[0],
    }


def answer(model: Path, options: dict[str, Any]) -> None:
    """In the child: load, answer, and say which stage begins."""
    import numpy as np
    from PIL import Image

    from edge_kernels.machine import cpu_count, cpu_name, isa
    from edge_runtime import Model, __version__
    from edge_runtime.loading.load import LoadOptions, needed_bytes
    from edge_runtime.store.find import find_model

    max_tokens = options.pop("max_tokens")
    noise = np.random.default_rng(0).integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((SIDE, SIDE))
    print("load", flush=True)
    with Model.load(model, **options) as loaded:
        stream = loaded.chat(
            [{"role": "user", "content": [picture, "What is it?"]}], stream=True, greedy=True, max_tokens=max_tokens
        )
        stream.on_progress = lambda progress: print(progress.stage, flush=True)
        for number, _ in enumerate(stream):
            if number == 0:
                print("answer", flush=True)
        found = stream.result()
        print(
            json.dumps(
                {
                    "timings_s": found.timings_s,
                    "prompt_tokens": found.prompt_tokens,
                    "completion_tokens": found.completion_tokens,
                    "slices": len(found.slices),
                    "n_ctx": loaded.n_ctx,
                    "estimated_bytes": needed_bytes(find_model(model), LoadOptions(**options)),
                    "version": __version__,
                    "cpu": cpu_name(),
                    "isa": isa(),
                    "threads": options.get("n_threads") or cpu_count(),
                }
            ),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="folder with a decoder and an mmproj file")
    parser.add_argument("--limit", type=float, default=5.6, metavar="GB", help="of the group, 0: no group  [5.6]")
    parser.add_argument("--usual", action="store_true", help="without --low-memory")
    parser.add_argument("--ctx", type=int, help="as of edge-runtime run")
    parser.add_argument("--kv-type", help="as of edge-runtime run")
    parser.add_argument("--threads", type=int, help="as of edge-runtime run")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens of the answer  [32]")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        answer(options.model, options.child)
        return
    given = {"n_ctx": options.ctx, "kv_type": options.kv_type, "n_threads": options.threads}
    load = {"low_memory": not options.usual, "max_tokens": options.max_tokens}
    load |= {name: value for name, value in given.items() if value is not None}
    result = run(options.model, int(options.limit * 1e9), load)
    print(f"{'stage':<10}{'RSS, MB':>10}{'anonymous':>12}{'of files':>10}")
    for name, peak in result["stages"].items():
        print(f"{name:<10}" + "".join(f"{peak[key] / 1e6:>{width}.0f}" for key, width in PARTS))
    print(f"{'peak':<10}{result['peak_rss'] / 1e6:>10.0f}{result['peak_anon'] / 1e6:>12.0f}")
    print(f"group: {result['group']}")
    summary = {"scenario": "low-memory", "limit_gb": options.limit, "options": load, **result}
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    print(json.dumps(summary))


PARTS = (("rss", 10), ("anon", 12), ("file", 10))

if __name__ == "__main__":
    main()
