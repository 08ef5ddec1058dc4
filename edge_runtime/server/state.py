"""What the routes share, reached through the application that a request belongs to."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import Depends, FastAPI, Request

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
    pulls: Places = field(default_factory=lambda: Places(4, 3, "models are being pulled"))
    uploads: Places = field(default_factory=lambda: Places(16, 12, "files are being uploaded"))
    making: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "edge-runtime making"))
    """Threads that look into files for new models; what others wait for has threads of its own."""
    responses: ResponseStore = field(default_factory=ResponseStore)
    """Kept for clients that go on from them."""
    started: float = field(default_factory=time.time)
    """Unix time."""


def server_of(app: FastAPI) -> ServerState:
    """What an application's routes share."""
    return cast("ServerState", app.state.server)


def state_of(request: Request) -> ServerState:
    """The server that a request came to."""
    return server_of(request.app)


State = Annotated[ServerState, Depends(state_of)]
"""Parameter of a route that needs the server."""
