"""What the web page tells about models besides Ollama's lists: the memory they need, and who may delete them.

Enters: the state of the server. Leaves: JSON at `/page/models`. An estimate is made from the headers of a model's
files, and made again only when they change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import psutil
from fastapi import APIRouter

from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.loading.load import LoadOptions, needed_bytes
from edge_runtime.server.registry.catalog import Listed
from edge_runtime.server.routing import JSONRoute
from edge_runtime.server.settings import Settings
from edge_runtime.server.state import ServerState, State
from edge_runtime.store.find import ModelPaths
from edge_runtime.store.names import ALIASES
from edge_runtime.system.memory import available_bytes

router = APIRouter(include_in_schema=False, route_class=JSONRoute)

OFFERED_BYTES = {"minicpm-v-4.5": 6_200_000_000}
"""Memory of the models that the page offers: the whole process, as docs/hardware.md has it."""


@router.get("/page/models")
async def models(state: State) -> dict[str, Any]:
    """Memory of this machine, what each model here needs, and which models can be pulled by a short name."""
    return await asyncio.to_thread(_facts, state)


def _facts(state: ServerState) -> dict[str, Any]:
    found = state.catalog.all()
    loaded = {slot.listed.files: slot.n_bytes for slot in state.registry.loaded() if slot.model is not None}
    return {
        "memory": {"total": psutil.virtual_memory().total, "free": available_bytes() + sum(loaded.values())},
        "models": [_model(listed, state, loaded) for listed in found],
        "offered": [{"name": name, "needs": OFFERED_BYTES.get(name)} for name in ALIASES],
    }


def _model(listed: Listed, state: ServerState, loaded: Mapping[Any, int]) -> dict[str, Any]:
    return {
        "name": listed.tag,
        "needs": _needs(listed, state.settings),
        "loaded": listed.files in loaded,
        "kept": state.catalog.is_owned(listed.name),
    }


def _needs(listed: Listed, settings: Settings) -> int | None:
    """Bytes of memory that a model needs with the owner's settings; None where its files cannot be read."""
    try:
        stamps = tuple((path.stat().st_mtime_ns, path.stat().st_size) for path in listed.files)
        load = tuple(sorted(settings.load.items(), key=lambda item: item[0]))
        return _estimate(listed.paths, load, stamps)
    except (EdgeRuntimeError, OSError):
        return None


@lru_cache(maxsize=64)
def _estimate(paths: ModelPaths, load: tuple[tuple[str, Any], ...], versions: tuple[tuple[int, int], ...]) -> int:
    return needed_bytes(paths, LoadOptions(**dict(load)).checked())
