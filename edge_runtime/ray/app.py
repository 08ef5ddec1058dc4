"""The HTTP server as a deployment of Ray Serve: `serve run edge_runtime.ray.app:app model=minicpm-v-4.5`.

`Arguments` enter, a Serve application leaves: replicas of the whole server, each with a model of its own, behind
Ray's proxy, which sends a request to the less busy of two. State of the server (stored responses, files, batches) is
a replica's own.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve.config import AutoscalingConfig

from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.ray.placing import everywhere, memory_needed, model_here
from edge_runtime.server.app import create_app
from edge_runtime.server.settings import Settings
from edge_runtime.server.state import server_of

HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 5.0, 30.0
OURS = ("host", "port", "models", "api_key", "load", "grace_s")
"""Settings that the arguments or the environment decide."""


class Arguments(BaseModel):
    """What `serve run` takes as NAME=VALUE, and a Serve configuration file as `args`."""

    model_config = ConfigDict(extra="forbid")

    model: str = "demo"
    """As `edge-runtime serve -m` takes it; a node that does not have it pulls it."""
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    """With more than `min_replicas`, Serve adds replicas while requests wait, and removes idle ones."""
    replicas_per_node: int = Field(1, ge=1)
    """At most; a model computes with all cores of its node, so a second one there adds memory, not speed."""
    requests_per_replica: float = Field(8, gt=0)
    """At the same time, above which Serve adds a replica: one step of the decoder answers up to eight."""
    cpus: float = Field(1, gt=0)
    """Reserved for a replica."""
    memory_gb: float | None = Field(None, gt=0)
    """Reserved for a replica; None: what the model will need, which this machine must then have or pull."""
    grace_s: float = Field(30.0, gt=0)
    """For running answers when a replica is removed."""
    load: dict[str, Any] = {}
    """Further arguments of `Model.load`, such as n_ctx and n_threads."""
    server: dict[str, Any] = {}
    """Further fields of `edge_runtime.server.settings.Settings`, such as allowed_hosts and max_queue."""

    @model_validator(mode="after")
    def _in_order(self) -> Arguments:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}; expected at least min_replicas, {self.min_replicas}."
            )
        known = {field.name for field in fields(Settings)} - {*OURS}
        if unknown := sorted({*self.server} - known):
            raise ValueError(f"server holds {', '.join(unknown)}; expected some of {', '.join(sorted(known))}.")
        return self

    def settings(self) -> Settings:
        """Settings of a replica's server.

        Clients reach it through the proxy under the proxy's names; all of a gateway's have one address.

        Raises
        ------
        MessageError
            When one is out of range.
        """
        server: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.server.items()
        }
        queue = server.setdefault("max_queue", Settings.max_queue)
        server.setdefault("max_queue_per_client", queue)
        return Settings(
            models=(everywhere(self.model),),
            api_key=os.environ.get("EDGE_RUNTIME_API_KEY"),
            load=self.load,
            grace_s=self.grace_s,
            **server,
        ).checked()


@serve.ingress()
class Replica:
    """One server with one model."""

    def __init__(self, settings: Settings) -> None:
        (model,) = settings.models
        model_here(model)
        self._app = create_app(settings)
        server_of(self._app).inference.decoders.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application whose lifespan loads the model: Serve sends no request before it has begun."""
        return self._app

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this raises.

        Raises
        ------
        EdgeRuntimeError
            When a model can no longer answer.
        """
        for slot in server_of(self._app).registry.loaded():
            if slot.model is not None and not slot.model.engine.thread.is_alive():
                raise EdgeRuntimeError(f"{slot.listed.name} has lost its inference thread; start a new replica.")


def app(arguments: Arguments | dict[str, Any]) -> serve.Application:
    """Describe the deployment; `serve run` calls this with the arguments of its command line.

    Raises
    ------
    ModelFileError, DownloadError
        When the model's memory is to be estimated, and it is not here and cannot be pulled.
    MessageError
        When an argument is out of range.
    """
    arguments = Arguments.model_validate(arguments)  # `serve run` has texts
    settings = arguments.settings()
    if arguments.memory_gb is None:
        needed = memory_needed(model_here(everywhere(arguments.model)), arguments.load)
    else:
        needed = int(arguments.memory_gb * 1e9)
    scales = arguments.max_replicas > arguments.min_replicas
    autoscaling = AutoscalingConfig(
        min_replicas=arguments.min_replicas,
        max_replicas=arguments.max_replicas,
        target_ongoing_requests=arguments.requests_per_replica,
    )
    deployment = serve.deployment(
        Replica,
        name="edge-runtime",
        num_replicas=None if scales else arguments.min_replicas,
        autoscaling_config=autoscaling if scales else None,
        ray_actor_options={"num_cpus": arguments.cpus, "memory": needed},
        max_replicas_per_node=arguments.replicas_per_node,
        max_ongoing_requests=settings.max_queue,
        graceful_shutdown_timeout_s=arguments.grace_s,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
    )
    return deployment.bind(settings)
