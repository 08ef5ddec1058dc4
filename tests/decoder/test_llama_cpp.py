"""llama.cpp is missing, does not load, or was compiled for another processor: a sentence with the commands."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from edge_runtime.decoder import llama_cpp
from edge_runtime.decoder.processor import missing_flags, needed_flags, own_flags
from edge_runtime.errors import BackendUnavailable

load = llama_cpp.library.__wrapped__  # not the one that is loaded already


class Loading:
    """In place of the package: importing its library fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> object:
        if name == "llama_cpp":
            raise self.error
        raise AttributeError(name)


def refused(monkeypatch: pytest.MonkeyPatch, package: object) -> str:
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    with pytest.raises(BackendUnavailable) as error:
        load()
    return str(error.value)


@pytest.mark.parametrize(
    ("system", "command"),
    [
        ("linux", "apt install g++ cmake; Fedora: dnf install gcc-c++ cmake"),
        ("darwin", "xcode-select --install; brew install cmake"),
        ("win32", "winget install Microsoft.VisualStudio.2022.BuildTools Kitware.CMake"),
        ("freebsd14", "a C++ compiler and cmake"),
    ],
)
def test_not_installed(monkeypatch, system, command):
    monkeypatch.setattr(sys, "platform", system)
    text = refused(monkeypatch, None)
    assert text.startswith("llama-cpp-python is not installed (")
    assert f"pip install {llama_cpp.RELEASE}" in text
    assert command in text
    assert "--extra-index-url=https://abetlen.github.io/llama-cpp-python/whl/cpu" in text


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("libgomp.so.1: cannot open shared object file", "apt install libgomp1; Fedora: dnf install libgomp"),
        (
            "libc.musl-x86_64.so.1: cannot open shared object file",
            "for another system .* --no-binary=llama-cpp-python",
        ),
        ("/lib/libc.so.6: version `GLIBC_2.38' not found", "for another system .* --no-binary=llama-cpp-python"),
        ("/lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found", "for another system"),
        ("invalid ELF header", "reinstall it with 'pip install --force-reinstall --no-cache-dir"),
    ],
)
def test_does_not_load(monkeypatch, reason, remedy):
    monkeypatch.setattr(sys, "platform", "linux")
    text = refused(monkeypatch, Loading(RuntimeError(f"Failed to load shared library: {reason}")))
    assert reason in text
    assert re.search(remedy, text), text


def test_compiled_for_another_processor(monkeypatch):
    package = types.SimpleNamespace(
        llama_cpp=types.SimpleNamespace(
            llama_print_system_info=lambda: b"CPU : AVX2 = 1 | QUANTUM = 1 | AMX_INT8 = 1 |"
        )
    )
    monkeypatch.setattr("edge_runtime.decoder.processor.own_flags", lambda: frozenset({"avx2"}))
    text = refused(monkeypatch, package)
    assert "compiled for a processor with amx_int8, amx_tile, which this one lacks; compile it here: 'pip" in text


def test_flags():
    said = "CPU : SSE3 = 1 | AVX2 = 1 | FMA = 0 | AVX512 = 1 | LLAMAFILE = 1 | OPENMP = 1 | REPACK = 1 | "
    assert needed_flags(said) == ["avx2", "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl", "pni"]
    said = "CPU : NEON = 1 | ARM_FMA = 1 | FP16_VA = 1 | DOTPROD = 1 | MATMUL_INT8 = 1 | "
    assert needed_flags(said) == ["asimd", "asimddp", "asimdhp", "fphp", "i8mm"]


def test_flags_of_this_processor(tmp_path):
    """Emulators may show the file of the machine below: its line has another name, and nothing is concluded."""
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\nbugs\t\t: none\n")
    assert own_flags(path, "x86_64") == {"fpu", "avx2", "fma"}
    assert own_flags(path, "aarch64") == frozenset()
    path.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp\n")
    assert own_flags(path, "aarch64") == {"fp", "asimd", "asimddp"}
    assert own_flags(path, "riscv64") == frozenset()
    assert own_flags(Path("/nowhere")) == frozenset()


def test_the_library_that_is_installed_runs_here():
    info = llama_cpp.library().llama_print_system_info().decode()
    assert needed_flags(info), info
    assert missing_flags(info) == []
