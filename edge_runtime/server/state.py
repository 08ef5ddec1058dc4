"""What the routes share, reached through the application that a request belongs to."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import Depends, FastAPI, Request

from edge_runtime.server.catalog import Catalog
from edge_runtime.server.inference import Inference
from edge_runtime.server.metrics import Metrics
from edge_runtime.server.models import ModelRegistry
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
