"""All middleware in order, and warnings for the owner."""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from edge_runtime.server.middleware.bodies import Bodies
from edge_runtime.server.middleware.gate import Gate, Key
from edge_runtime.server.middleware.head_of_get import HeadOfGet
from edge_runtime.server.middleware.headers import Headers
from edge_runtime.server.middleware.origins import ANY, allowed_origins
from edge_runtime.server.middleware.shares import Clients
from edge_runtime.server.middleware.time_limit import TimeLimit
from edge_runtime.server.settings import Settings


def middleware(settings: Settings) -> list[Middleware]:
    """The server's middleware, outermost first."""
    found = [Middleware(Headers), Middleware(Bodies, settings=settings), Middleware(TimeLimit, settings=settings)]
    found += [Middleware(Clients), Middleware(Gate, settings=settings)]
    allowed = allowed_origins(settings)
    if settings.cors_origins or allowed is not None:
        found.append(
            Middleware(
                CORSMiddleware,
                allow_origins=[ANY] if ANY in settings.cors_origins else [],
                allow_origin_regex=None if allowed is None else allowed.pattern,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["Retry-After"],
                allow_private_network=True,  # the owner named the origin, or it is on this machine
            )
        )
    return [*found, Middleware(Key, settings=settings), Middleware(HeadOfGet)]


def warnings_for(settings: Settings) -> list[str]:
    """What an owner should know before the server starts."""
    found = []
    if not settings.is_loopback and settings.api_key is None:
        found.append(
            f"Anybody who can reach {settings.host}:{settings.port} can use this server without a key. "
            "Set one with --api-key, or listen on this machine alone with --host 127.0.0.1."
        )
    if settings.api_key is not None and len(settings.api_key) < 16:
        found.append(
            f"The API key has {len(settings.api_key)} characters and can be guessed; use 16 or more, such as the "
            "output of: openssl rand -hex 24"
        )
    if ANY in settings.cors_origins and settings.api_key is None:
        found.append("Every web page open in a browser here can use this server (--cors '*', no --api-key).")
    if "*" in settings.allow_url:
        found.append("Pictures are fetched from any public address that a request names (--allow-url '*').")
    return found
