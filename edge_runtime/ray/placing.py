"""A model's name → its files on this node and the memory it needs there. Knows nothing of Ray."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.errors import ModelFileError
from edge_runtime.inputs.image import PIXEL_LIMIT
from edge_runtime.loading.load import LoadOptions, needed_bytes
from edge_runtime.store.find import ModelPaths, find_model
from edge_runtime.store.names import DEMO, parse_source
from edge_runtime.store.pull import pull

PROCESS_BYTES = 300 << 20
"""Of a process besides its model: Python, Ray, libraries, compiled kernels (288 MiB with the demo model)."""


@dataclass(frozen=True)
class Chosen:
    """A model and how it is loaded on each node."""

    model: str = "demo"
    """As for `Model.load`; a path must be the same on every node."""
    mmproj: str | None = None
    load: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `Model.load`."""
    folder: str = ""
    """Where relative paths of items begin; empty: items name none."""
    pixel_limit: int = PIXEL_LIMIT
    """Of one picture."""
    sees: tuple[str, ...] = ()
    """Paths that items name: a node that does not see them is left out."""


def everywhere(name: str) -> str:
    """A model's name that means the same in every folder: paths are made absolute."""
    if name == DEMO or parse_source(name) is not None:
        return name
    return os.path.abspath(os.path.expanduser(name))  # noqa: PTH100, PTH111 - a type may follow: FOLDER:Q5_K_M


def model_here(name: str, mmproj: str | None = None) -> ModelPaths:
    """Files of a model on this node; one that has a source is pulled if it is not here.

    Raises
    ------
    ModelFileError
        When the name is a path that this node does not see, or names no model.
    DownloadError
        When it cannot be pulled.
    """
    source = parse_source(name)
    if source is not None and source.kind != "ollama":
        with contextlib.suppress(ModelFileError):
            return find_model(name, mmproj)
        pull(name)
    return find_model(name, mmproj)


def memory_needed(paths: ModelPaths, load: Mapping[str, Any]) -> int:
    """Bytes to reserve for a process with a model: what loading it with these options will need, as estimated.

    Parameters
    ----------
    load : keyword arguments of `Model.load`, without the model's name.

    Raises
    ------
    ModelFileError
        When its files are damaged.
    MessageError
        When an option is out of range.
    """
    return needed_bytes(paths, LoadOptions(**load).checked()) + PROCESS_BYTES
