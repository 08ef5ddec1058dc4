"""Measure time and peak memory of `edge-runtime convert` on a large checkpoint.

    python benchmarks/make_checkpoint.py /tmp/big --gb 4
    python benchmarks/conversion_memory.py /tmp/big [-o FOLDER] [--type q4_k_m] [--vision-type q8_0] [--json FILE]

The conversion runs as a child process; its memory and that of its own children is summed every 20 ms. RSS counts
every page in the process's address space: anonymous memory, which nothing else can give back, and pages of mapped
files, which the kernel drops when memory is short. Both are shown, since only the first can exhaust a small machine.
VmHWM is the kernel's own high-water mark of RSS, which no sampling can miss; it is per process, so the largest
is shown. Outside Linux psutil's RSS is all there is.

The last line is one JSON object: `scenario`, `ours_s`, `peak_rss_bytes`, `peak_anon_bytes`, `peak_file_bytes`,
`high_water_bytes`, the sizes of what went in and out, and the machine's processor.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

PERIOD_S = 0.02
ROOT = Path(__file__).resolve().parent.parent
FIELDS = {"VmRSS": "rss", "RssAnon": "anon", "RssFile": "file", "VmHWM": "high_water"}


@dataclass
class Memory:
    """Bytes in use by a process tree, or the largest seen."""

    rss: int = 0
    anon: int = 0
    file: int = 0
    high_water: int = 0


def measure(pid: int) -> Memory:
    """Memory of a process and its descendants now; a process that is gone counts as nothing."""
    if not Path("/proc/self/status").exists():
        return _measure_with_psutil(pid)
    total = Memory()
    for process in _tree(pid):
        try:
            lines = Path(f"/proc/{process}/status").read_text("utf-8").splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for line in lines:
            key, _, value = line.partition(":")
            if name := FIELDS.get(key):
                n_bytes = int(value.split()[0]) * 1024
                add = max if name == "high_water" else int.__add__
                setattr(total, name, add(getattr(total, name), n_bytes))
    return total


def _tree(pid: int) -> list[int]:
    """A process and its descendants; children are listed per thread that started them."""
    found = [pid]
    for process in found:
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found += map(int, path.read_text("ascii").split())
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def _measure_with_psutil(pid: int) -> Memory:
    import psutil

    try:
        process = psutil.Process(pid)
        rss = sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        rss = 0
    return Memory(rss=rss, high_water=rss)


def watch(command: list[str]) -> tuple[Memory, float]:
    """Run a command to its end; return its peaks and how long it took, in seconds."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "converters"))}
    peak, started = Memory(), time.perf_counter()
    with subprocess.Popen(command, env=environment) as child:
        while child.poll() is None:
            now = measure(child.pid)
            for name, value in asdict(now).items():
                setattr(peak, name, max(getattr(peak, name), value))
            time.sleep(PERIOD_S)
    seconds = time.perf_counter() - started
    if child.returncode:
        raise SystemExit(f"{' '.join(command[2:4])} failed with exit code {child.returncode}")
    return peak, seconds


def cpu_name() -> str:
    """Name of the processor, as far as the system tells it."""
    sys.path.insert(0, str(ROOT / "kernels"))
    from edge_kernels.compile import cpu_name as name

    return str(name())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="folder for the files (default: a temporary one, deleted)")
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--vision-type", default="q8_0")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.checkpoint.resolve().parent) as temporary:
        folder = arguments.output or Path(temporary)
        command = [sys.executable, "-m", "edge_runtime", "convert", str(arguments.checkpoint), "-o", str(folder)]
        command += ["--type", arguments.type, "--vision-type", arguments.vision_type, "--force"]
        peak, seconds = watch(command)
        written = {path.name: path.stat().st_size for path in sorted(folder.glob("*.gguf"))}
    source = sum(path.stat().st_size for path in arguments.checkpoint.glob("*.safetensors"))
    for name, value in asdict(peak).items():
        print(f"peak {name:<11} {value / 1e9:6.2f} GB")
    print(f"time             {seconds:6.1f} s for a checkpoint of {source / 1e9:.2f} GB")
    summary = {
        "scenario": f"convert-{arguments.type}-{arguments.vision_type}",
        "ours_s": round(seconds, 2),
        **{f"peak_{name}_bytes": value for name, value in asdict(peak).items() if name != "high_water"},
        "high_water_bytes": peak.high_water,
        "checkpoint_bytes": source,
        "written_bytes": written,
        "sample_period_s": PERIOD_S,
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": sys.version.split()[0],
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
