"""A server on the loopback: the real application in uvicorn, in a thread, with the demo model."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from fastapi import FastAPI

from edge_runtime.server import running as serving
from edge_runtime.server.app import create_app
from edge_runtime.server.running import Server
from edge_runtime.server.settings import Settings
from edge_runtime.server.state import ServerState
from server.asked import SIGN

__all__ = ["SIGN"]


@dataclass
class Served:
    """A running server."""

    url: str
    app: FastAPI
    server: Server

    @property
    def state(self) -> ServerState:
        """What its routes share."""
        return self.app.state.server


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[Served]:
    """Run a server while the block lasts, as the command does, in a thread."""
    app = create_app(settings)
    started: queue.Queue[tuple[str, Server] | BaseException] = queue.Queue()

    def run() -> None:
        try:
            asyncio.run(serving.serve(app, settings, lambda url, server: started.put((url, server))))
        except BaseException as error:  # noqa: BLE001 - raised where the test waits
            started.put(error)

    thread = threading.Thread(target=run, name="server under test")
    thread.start()
    found = started.get(timeout=120)
    if isinstance(found, BaseException):
        raise found
    url, server = found
    try:
        yield Served(url, app, server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not end"


@pytest.fixture(scope="session")
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Empty stores, ours and Ollama's, for all servers of a session."""
    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_RUNTIME_MODELS", str(folder / "models"))
        patch.setenv("OLLAMA_MODELS", str(folder / "ollama"))
        patch.setenv("EDGE_RUNTIME_CACHE_DIR", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="session")
def server(own_store: Path) -> Iterator[Served]:
    """A server with the demo model, for tests that change nothing in it."""
    with running(Settings(port=0, models=("demo",), heartbeat_s=0.05)) as served:
        yield served


@pytest.fixture
def serve(own_store: Path) -> Iterator[Callable[..., Served]]:
    """Start further servers, with settings of the test's own."""
    with contextlib.ExitStack() as stack:

        def start(**settings: Any) -> Served:
            return stack.enter_context(running(Settings(**{"port": 0, "heartbeat_s": 0.05, **settings})))

        yield start


@pytest.fixture
def client(server: Served) -> Iterator[httpx.Client]:
    """A plain HTTP client of the common server."""
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that end only when they are stopped, or at their `num_predict`."""
    monkeypatch.setattr("edge_runtime.generation.sampling.Sampler.sample", lambda self, context, row: 40)
    monkeypatch.setattr("edge_runtime.generation.text_stream.RepetitionDetector.feed", lambda self, token_id: False)


def openai_client(served: Served) -> openai.OpenAI:
    plain = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60, http_client=plain)


@pytest.fixture
def ai(server: Served) -> Iterator[openai.OpenAI]:
    """A client of the demo model."""
    with openai_client(server) as client:
        yield client


@pytest.fixture
def claude(server: Served) -> Iterator[anthropic.Anthropic]:
    plain = anthropic.DefaultHttpxClient(trust_env=False)
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, http_client=plain) as client:
        yield client
