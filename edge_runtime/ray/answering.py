"""A node's worker: items → answers of the model that it loaded. What fails is an outcome, too: its error."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import ray

from edge_runtime.answers import Answer
from edge_runtime.batch.answering import Answering
from edge_runtime.batch.items import Failure, Item
from edge_runtime.inputs.workers.pool import DecoderPool
from edge_runtime.model import Model
from edge_runtime.ray.placing import Chosen, model_here


def answering(chosen: Chosen) -> Callable[[], Callable[[Item], Answer | Failure]]:
    """What makes a worker's function on its node, which pulls the model if it is not there."""
    return partial(_make, chosen)


def _make(chosen: Chosen) -> Callable[[Item], Answer | Failure]:
    model_here(chosen.model, chosen.mmproj)
    if chosen.folder:
        os.chdir(chosen.folder)  # this process is the worker's own
    load = {**chosen.load, "n_threads": chosen.load.get("n_threads") or _threads()}
    model = Model.load(chosen.model, mmproj=chosen.mmproj, **load)
    return Answering(model, {"decoders": DecoderPool(pixel_limit=chosen.pixel_limit)})


def _threads() -> int | None:
    """As many as Ray may use processors on this node, if it has more; None leaves the choice to the model."""
    here = ray.get_runtime_context().get_node_id()
    allowed = next(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == here)
    return int(allowed) if allowed < (os.cpu_count() or 1) else None
