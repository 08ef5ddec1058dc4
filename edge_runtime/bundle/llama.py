"""llama.cpp's library, loaded in a process of its own: which processor features and system libraries it uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime.decoder.processor import needed_flags

# Where the dynamic loader finds these, every Linux with glibc has them (PEP 600, "manylinux").
_EVERYWHERE = (
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "librt.so.1",
    "libpthread.so.0",
    "libutil.so.1",
    "libgcc_s.so.1",
)
_EVERYWHERE_ELSE = ("libstdc++.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1")

_ASK = """\
import json, sys
sys.path[:0] = sys.argv[1:]
from llama_cpp import llama_cpp
info = llama_cpp.llama_print_system_info().decode()
paths = sorted({line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if ".so" in line})
print(json.dumps([info, paths]))
"""
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Found:
    """What the library said of itself."""

    cpu_flags: list[str] = field(default_factory=list)
    loaded: dict[str, Path] = field(default_factory=dict)
    """Shared libraries of the process, by the names under which others need them."""


def ask(wheel: Path) -> Found | None:
    """Load the library of a wheel; None when it does not load here."""
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        try:
            done = subprocess.run(
                [sys.executable, "-c", _ASK, folder], capture_output=True, text=True, timeout=TIMEOUT_S
            )
            info, paths = json.loads(done.stdout)
        except (subprocess.TimeoutExpired, ValueError):
            return None
        # Several builds, of which the library chose one for this processor: it asks for none.
        variants = [*Path(folder).rglob("libggml-cpu-*.so")]
    return Found([] if variants else needed_flags(info), {_soname(path): Path(path) for path in paths})


def _soname(path: str) -> str:
    """libgomp.so.1 for /usr/lib/libgomp.so.1.0.0."""
    stem, dot, rest = os.path.basename(path).partition(".so")  # noqa: PTH119 - may be of another system
    return stem + dot + ".".join(rest.split(".")[:2])


def not_everywhere(libraries: Iterable[str]) -> list[str]:
    """Those of the libraries that a small system may lack."""
    return sorted({*libraries} - {*_EVERYWHERE, *_EVERYWHERE_ELSE})
