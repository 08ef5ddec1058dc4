"""Fixtures shared by all tests: the tiny checkpoint, what it converts to, and loaded models; and test processes."""

from __future__ import annotations

from support.cores import every_core, pin_worker

pin_worker()

# ruff: noqa: E402 - what follows counts the cores when it is imported
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest

from edge_converters import convert_checkpoint
from edge_kernels.machine import cpu_count
from edge_runtime import Model

os.environ.setdefault("EDGE_RUNTIME_COMPILED", "off")  # what is tested are the sources
FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_report_header() -> str:
    """Versions that decide results."""
    names = ("numpy", "numba", "llama-cpp-python", "pillow", "tokenizers")
    return "with " + ", ".join(f"{name} {metadata.version(name)}" for name in names)


def pytest_unconfigure() -> None:
    """Close what llama-cpp-python opens at import and leaves open, or every run ends with its ResourceWarning."""
    utils = sys.modules.get("llama_cpp._utils")
    for name in ("outnull_file", "errnull_file"):
        if utils is not None:
            getattr(utils, name).close()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """As many processes as there are cores, and memory for: one takes up to 2 GB with what it starts."""
    return max(1, min(cpu_count(), psutil.virtual_memory().total // 2_000_000_000))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Among several processes, hand out the longest files first, lest one process works alone at the end."""
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Give a test marked every_core what the mark says, its fixtures included."""
    with every_core() if item.get_closest_marker("every_core") else nullcontext():
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def no_tuning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Load models as they are loaded where nobody has tuned them."""
    folder = str(tmp_path_factory.mktemp("data"))
    with mock.patch("platformdirs.user_data_dir", return_value=folder):
        yield


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let programs that the test starts be interrupted: a shell's background jobs ignore SIGINT, and so do theirs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The tiny checkpoint in the official layout."""
    return FIXTURES / "checkpoint"


@pytest.fixture(scope="session")
def exact_folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as float32 GGUF files."""
    folder = tmp_path_factory.mktemp("exact")
    convert_checkpoint(checkpoint, folder, decoder_type="f32", vision_type="f32")
    return folder


@pytest.fixture(scope="session")
def exact_model(exact_folder: Path) -> Iterator[Model]:
    """The tiny model in float32, computing exactly."""
    with Model.load(exact_folder, exact=True) as model:
        yield model


@pytest.fixture(scope="session")
def demo() -> Iterator[Model]:
    """The demo model of the package."""
    with Model.load("demo") as model:
        yield model


@pytest.fixture(scope="session")
def images() -> dict[str, Path]:
    """Name to path of every fixture picture and video frame."""
    manifest = json.loads((FIXTURES / "manifest.json").read_text())
    found = {name: FIXTURES / entry["file"] for name, entry in manifest["images"].items()}
    for video in manifest["videos"].values():
        found |= {Path(frame).stem: FIXTURES / frame for frame in video["frames"]}
    return found


def golden(name: str) -> dict[str, Any]:
    """Arrays of one golden file."""
    with np.load(FIXTURES / "goldens" / f"{name}.npz") as data:
        return dict(data)
