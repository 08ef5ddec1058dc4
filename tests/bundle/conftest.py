"""Fixtures of bundles: small wheels instead of the large ones, so that making and installing takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from edge_runtime.bundle import selection
from edge_runtime.bundle.make import Made, Wanted, make_bundle
from edge_runtime.bundle.targets import own_name
from support.gguf_maker import mini_decoder, mini_mmproj
from support.wheel_maker import FAKE_RUNTIME, make_llama, make_wheel

ISAS = ["avx2", "amx"]


def direct_requirements(extra: str = "") -> list[Requirement]:
    """What edge-runtime itself asks for."""
    listed = [Requirement(text) for text in metadata.requires("edge-runtime") or ()]
    return [each for each in listed if each.marker is None or each.marker.evaluate({"extra": extra})]


def platform_tag(target: str) -> str:
    return f"py3-none-{target.replace('-', '_', 1)}"


def small_wheels(folder: Path, target: str) -> Path:
    """A folder with a wheel of everything that edge-runtime asks for; that of llama-cpp-python is for the target."""
    for requirement in direct_requirements():
        if requirement.name == "llama-cpp-python":
            make_llama(folder, platform_tag(target))
        else:
            make_wheel(folder, requirement.name, metadata.version(requirement.name))
    return folder


def small_runtime(folder: Path, kernels: Path | None, platform: str) -> Path:
    """In place of `pack_own`: a program that prints its arguments."""
    compiled = {f"edge_kernels/compiled/{path.name}": path.read_bytes() for path in (kernels or folder).glob("*.o")}
    return make_wheel(
        folder,
        "edge-runtime",
        metadata.version("edge-runtime"),
        f"py3-none-{platform}",
        {"edge_runtime/__init__.py": FAKE_RUNTIME, **compiled},
        ("numpy", "llama-cpp-python"),
        {"edge-runtime": "edge_runtime:main"},
    )


def compile_kernels(target: str, wanted: Sequence[str] | None, folder: Path) -> list[str]:
    """In place of a minute of compiling."""
    isas = ISAS if wanted is None else [*wanted]
    for isa in isas:
        (folder / f"{isa}.o").write_bytes(f"{target} {isa}".encode())
    return isas


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small wheels for this machine; making the bundle's own is replaced, too."""
    monkeypatch.setattr(selection, "pack_own", small_runtime)
    return small_wheels(tmp_path / "wheels", own_name())


def small_model(folder: Path) -> Path:
    """A folder with a small model and its licence."""
    folder.mkdir()
    (folder / "ggml-model-Q4_K_M.gguf").write_bytes(mini_decoder().build())
    (folder / "mmproj-model-f16.gguf").write_bytes(mini_mmproj().build())
    (folder / "LICENSE").write_text("the licence of the model\n")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model."""
    return small_model(tmp_path / "mini")


def make(model: Path | str, wheels: Path, output: Path, **wanted: object) -> Made:
    """A bundle without extras."""
    request = Wanted(str(model), extras=(), wheels=wheels, **wanted)  # type: ignore[arg-type]
    return make_bundle(request, output, compile_kernels, lambda text: None, force=False)
