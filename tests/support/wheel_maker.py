"""Small wheels, written by hand, and folders of them that stand for all that this package needs."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

FAKE_LLAMA = """\
def llama_print_system_info():
    return b"CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | FMA = 0 | OPENMP = 1 | "
"""
FAKE_RUNTIME = """\
import json, sys
def main():
    print(json.dumps({"arguments": sys.argv[1:]}))
"""


def make_wheel(
    folder: Path,
    name: str,
    version: str = "1.0",
    tag: str = "py3-none-any",
    files: Mapping[str, str | bytes] | None = None,
    requires: tuple[str, ...] = (),
    commands: Mapping[str, str] | None = None,
) -> Path:
    """Write a wheel with these files, and a licence."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    needed = "".join(f"Requires-Dist: {text}\n" for text in requires)
    contents: dict[str, str | bytes] = {
        **(files or {f"{name.replace('-', '_')}/__init__.py": f"NAME = {name!r}\n"}),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense: MIT\n{needed}",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: {tag}\n",
        f"{info}/licenses/LICENSE": f"the licence of {name}\n",
    }
    if commands:
        lines = "".join(f"{command} = {target}\n" for command, target in commands.items())
        contents[f"{info}/entry_points.txt"] = f"[console_scripts]\n{lines}"
    record = ""
    path = folder / f"{stem}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in contents.items():
            data = text.encode() if isinstance(text, str) else text
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            name = f'"{inside}"' if "," in inside else inside
            record += f"{name},sha256={digest},{len(data)}\n"
            archive.writestr(zipfile.ZipInfo(inside), data)
        archive.writestr(zipfile.ZipInfo(f"{info}/RECORD"), f"{record}{info}/RECORD,,\n")
    return path


def make_llama(folder: Path, tag: str) -> Path:
    """Write a llama-cpp-python that says what it was compiled with, and does nothing else."""
    return make_wheel(
        folder,
        "llama-cpp-python",
        "0.3.36",
        tag,
        {"llama_cpp/__init__.py": "", "llama_cpp/llama_cpp.py": FAKE_LLAMA, "llama_cpp/lib/libggml-base.so": b"none"},
    )
