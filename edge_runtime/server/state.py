"""State that the routes share, reached through a request's application."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import Depends, FastAPI, Request

from edge_runtime.server.batches.runner import Batches
from edge_runtime.server.inference import Inference
from edge_runtime.server.metrics import Metrics
from edge_runtime.server.middleware.shares import Places
from edge_runtime.server.registry.catalog import Catalog
from edge_runtime.server.registry.loaded import ModelRegistry
from edge_runtime.server.responses_store import ResponseStore
from edge_runtime.server.settings import Settings


@dataclass
class ServerState:
    """One server."""

    settings: Settings
    catalog: Catalog
    registry: ModelRegistry
    inference: Inference
    metrics: Metrics
    batches: Batches
    pulls: Places = field(default_factory=lambda: Places(4, 3, "models are being pulled"))
    uploads: Places = field(default_factory=lambda: Places(16, 12, "files are being uploaded"))
    making: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "edge-runtime making"))
    """Threads that read files for new models; work that other requests wait for has its own threads."""
    responses: ResponseStore = field(default_factory=ResponseStore)
    """Stored for clients that continue them."""
    started: float = field(default_factory=time.time)
    """Unix time."""


def server_of(app: FastAPI) -> ServerState:
    """The state that an application's routes share."""
    return cast("ServerState", app.state.server)


def state_of(request: Request) -> ServerState:
    """The state of the server that received a request."""
    return server_of(request.app)


State = Annotated[ServerState, Depends(state_of)]
"""Parameter of a route that needs the server."""
