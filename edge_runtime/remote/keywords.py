"""Keyword arguments of `Model.connect`; a module of its own, so that naming them imports no client of HTTP."""

from __future__ import annotations

from typing import TypedDict


class ConnectKeywords(TypedDict, total=False):
    """How a server is asked."""

    dialect: str | None
    """`edge-runtime`, `vllm`, `sglang`, `llama-server` or `openai`; None asks the server what it is."""
    key: str | None
    """Sent as a bearer token; None takes EDGE_RUNTIME_ENDPOINT_KEY of the environment, or for OpenAI's own server
    OPENAI_API_KEY."""
    connect_s: float
    """Seconds for a connection; 10 unless given."""
    first_token_s: float
    """Seconds until the first piece of an answer; 1800."""
    between_s: float
    """Seconds without a sign of life after that; 300."""
    retries: int
    """How often a failure that may pass is tried again, before anything of an answer has arrived; 4."""
    parallel: int
    """Requests at the same time; further ones wait in this process; 16."""
