"""edge-runtime batch --ray: the same items and the same output, answered on a cluster."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edge_runtime.cli import terminal as console

if TYPE_CHECKING:
    from edge_runtime.batch.items import Item
    from edge_runtime.ray.batch import ClusterRunner

ANY_MODEL = 1 << 31
"""In the place of what only a loaded model knows: each node refuses what its model cannot do."""


def check_options(ordered: bool, parallel: int | None) -> None:
    """Refuse options that have no meaning on a cluster."""
    if ordered:
        raise click.UsageError(
            "--ordered cannot be given with --ray: what a node had when it died is answered at the end."
        )
    if click.get_current_context().get_parameter_source("nice") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--nice cannot be given with --ray: it is the nodes that compute; set their priority.")
    if parallel is not None:
        raise click.UsageError("--parallel cannot be given with --ray: every node has as many items as it can use.")


def runner_on_ray(
    address: str,
    name: str,
    setup: Mapping[str, Any],
    request: Mapping[str, Any],
    words: Sequence[str],
) -> Callable[[Iterable[Item]], ClusterRunner]:
    """What makes a runner of items on a cluster.

    Parameters
    ----------
    setup, request : keyword arguments of `Model.load` and `Model.chat`.
    words : files and folders as named; nodes that do not see them are left out.
    """
    from edge_runtime.option_checks import ModelLimits, checked_options
    from edge_runtime.options import GenerationOptions
    from edge_runtime.ray.batch import ClusterRunner
    from edge_runtime.ray.placing import Chosen

    limits = ModelLimits(
        n_logits=ANY_MODEL, n_tokens=ANY_MODEL, stop_ids=frozenset(), max_beams=ANY_MODEL, max_answers=1
    )
    checked_options(GenerationOptions.of(request)[0], limits)
    load = {key: value for key, value in setup.items() if key != "mmproj"}
    load["adapters"] = {adapter: Path(file).absolute() for adapter, file in setup["adapters"].items()}
    load["cache_dir"] = None if setup["cache_dir"] is None else Path(setup["cache_dir"]).absolute()
    chosen = Chosen(
        name,
        None if setup["mmproj"] is None else str(setup["mmproj"]),
        load,
        folder=os.getcwd(),  # noqa: PTH109 - text
        sees=tuple(str(Path(word).expanduser().absolute()) for word in words if not glob.has_magic(word)),
        pixel_limit=request["pixel_limit"],
    )
    console.note(f"Looking for {name} on the nodes of the cluster...")
    return partial(ClusterRunner, address, chosen)
