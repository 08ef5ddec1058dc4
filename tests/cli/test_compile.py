"""`edge-runtime compile`: one line for each target, and a sentence for what cannot be made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_kernels import ahead, machine, shipped, targets
from edge_runtime.cli.program import main


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """A compiler that is done at once, and fails for AVX-512; returns what it is asked for."""
    asked: list[tuple[str, Path]] = []

    def compile_target(target: str, folder: Path) -> ahead.Compiled:
        asked.append((target, folder))
        if target == "avx512":
            raise ahead.CompileError("The compiler has failed.")
        return ahead.Compiled(target, folder / target, 12, 700_000, 61.4)

    monkeypatch.setattr(ahead, "compile_target", compile_target)
    return asked


def test_each_target_has_a_line(tmp_path: Path, compiler: list[tuple[str, Path]]) -> None:
    done = CliRunner().invoke(main, ["compile", *("--target", "neon") * 2, "--target", "avx2", "-o", str(tmp_path)])
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        f"neon: 12 kernels, 0.7 MB, 61 s, {tmp_path / 'neon'}",
        f"avx2: 12 kernels, 0.7 MB, 61 s, {tmp_path / 'avx2'}",
    ]
    assert f"EDGE_RUNTIME_COMPILED={tmp_path}" in done.stderr
    assert sorted(compiler) == [("avx2", tmp_path), ("neon", tmp_path)]


def test_all_are_those_of_this_family(
    tmp_path: Path, compiler: list[tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets.platform, "machine", lambda: "arm64")
    done = CliRunner().invoke(main, ["compile", "--target", "all", "-o", str(tmp_path)])
    assert done.exit_code == 0
    assert sorted(name for name, _ in compiler) == ["neon", "neon-dot", "neon-i8mm"]


def test_this_machines_go_into_the_package(compiler: list[tuple[str, Path]]) -> None:
    done = CliRunner().invoke(main, ["compile"])
    assert done.exit_code == 0
    assert compiler == [(machine.isa(), shipped.PACKAGE / "compiled")]
    assert done.stderr == ""


def test_one_failure_leaves_the_others(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["compile", "--target", "avx512", "--target", "avx2", "-o", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stdout.startswith("avx2: ")
    assert done.stderr == "edge-runtime: The compiler has failed.\n"


def test_where_to_write_instead_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    done = CliRunner().invoke(main, ["compile", "--target", "avx512"])
    assert done.exit_code == 1
    assert "With -o FOLDER they are written elsewhere; EDGE_RUNTIME_COMPILED then names it." in done.stderr


def test_no_such_target(compiler: list[tuple[str, Path]]) -> None:
    done = CliRunner().invoke(main, ["compile", "--target", "avx2", "--target", "mmx"])
    assert done.exit_code == 2
    assert "'mmx' is no instruction set with kernels; there are amx, " in done.stderr
    assert compiler == []
