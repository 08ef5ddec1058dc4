"""Notes about compiling: given before the first picture or prompt, and never again."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from edge_kernels import compile as kernel_compile
from edge_runtime import Model
from edge_runtime.cli.terminal import PICTURE_KERNELS, PROMPT_KERNELS, first_compile
from edge_runtime.decoder import kernel_products

SIGN = Path(__file__).parents[2] / "examples" / "sign.png"


def test_compiling_is_announced_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("edge_kernels.compile.cache_directory", lambda: tmp_path)
    monkeypatch.setattr("edge_kernels.shipped.find", lambda: None)
    picture, prompt = first_compile(pictures=True, prompts=True)
    assert "First picture" in picture
    assert "First prompt" in prompt
    assert first_compile(pictures=False, prompts=False) == []
    for module, note in ((PICTURE_KERNELS, picture), (PROMPT_KERNELS, prompt)):
        assert note in first_compile(pictures=True, prompts=True)
        room, stem = module.split(".")
        (tmp_path / f"{room}_a1b2").mkdir()  # as numba names a folder of sources
        (tmp_path / f"{room}_a1b2" / f"{stem}._kernel-1.py311.1.nbc").touch()
    assert first_compile(pictures=True, prompts=True) == []


@pytest.mark.parametrize("module", [PICTURE_KERNELS, PROMPT_KERNELS])
def test_the_modules_asked_about_have_kernels(module: str) -> None:
    importlib.import_module(f"edge_kernels.{module}")
    assert f"edge_kernels.{module}" in {kernel.py_func.__module__ for kernel in kernel_compile._kernels}


def test_nothing_is_announced_after_a_picture() -> None:
    with Model.load("demo") as model:
        model.chat([{"role": "user", "content": [SIGN, "What does it say?"]}], max_tokens=1)
    assert first_compile(pictures=True, prompts=False) == []


def test_compiling_for_the_decoder_is_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from edge_kernels.ggml_backend import register
    from edge_kernels.ggml_backend.library import BackendError

    def refuse(*, claims_weights: bool) -> None:
        raise BackendError("not here")

    monkeypatch.setattr(register, "register", refuse)
    for compiled in (False, True):
        caplog.clear()
        monkeypatch.setattr("edge_kernels.compile.is_compiled", lambda module, known=compiled: known)
        with caplog.at_level(logging.WARNING), kernel_products.new_context(with_kernels=True) as with_kernels:
            assert not with_kernels
        assert ("compiling the decoder's kernels" in caplog.text) is not compiled


def test_garbage_is_left_at_the_end() -> None:
    program = """
import atexit, gc
atexit.register(lambda: print("collected" if gc.isenabled() or not gc.get_freeze_count() else "left"))
from edge_runtime.cli import main
main(["info"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "left"
