"""Memory of a process tree while it works.

RSS counts every resident page of the process: anonymous memory, which only the process can give back, and pages of
mapped files, which the kernel drops when memory is short. Both are reported, since only the first can exhaust a small
machine. VmHWM is the kernel's own high-water mark of RSS, which misses no peak between samples; it is per process, so
the largest is reported. Outside Linux psutil's RSS is all there is.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PERIOD_S = 0.02
ROOT = Path(__file__).resolve().parents[2]
FIELDS = {"VmRSS": "rss", "RssAnon": "anon", "RssFile": "file", "VmHWM": "high_water"}


@dataclass
class Memory:
    """Bytes in use by a process tree, or the largest seen."""

    rss: int = 0
    anon: int = 0
    file: int = 0
    high_water: int = 0


def measure(pid: int) -> Memory:
    """Memory of a process and its descendants now; a process that has ended counts as nothing."""
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


def watch(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> tuple[Memory, float]:
    """Run a command to its end; return its peaks and its duration in seconds.

    Parameters
    ----------
    environment : of the command; by default one in which this checkout's packages are found.

    Raises
    ------
    SystemExit
        When the command fails; with the last line of its output, which is not shown otherwise.
    """
    environment = environment or os.environ | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "converters"))
    }
    peak, started = Memory(), time.perf_counter()
    command = [str(part) for part in command]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        subprocess.Popen(command, env=environment, stdout=said, stderr=said) as child,
    ):
        while child.poll() is None:
            now = measure(child.pid)
            for name, value in asdict(now).items():
                setattr(peak, name, max(getattr(peak, name), value))
            time.sleep(PERIOD_S)
        seconds = time.perf_counter() - started
        if child.returncode:
            said.seek(0)
            last = said.read().strip().splitlines()[-1:] or ["nothing"]
            raise SystemExit(f"{' '.join(command[:4])} … failed with exit code {child.returncode}: {last[0][:300]}")
    return peak, seconds
