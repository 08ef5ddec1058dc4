"""Settings → application: routes, the middleware before them, and the lifetime of the models behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from edge_runtime.server import errors, idle_memory, page_facts, page_preview, system, upstream
from edge_runtime.server import web_page as pages
from edge_runtime.server.anthropic import batches as anthropic_batches
from edge_runtime.server.anthropic import messages as anthropic
from edge_runtime.server.batches.runner import Batches
from edge_runtime.server.inference import Inference
from edge_runtime.server.metrics import Metrics
from edge_runtime.server.middleware import envelope, stack
from edge_runtime.server.ollama import chat as ollama
from edge_runtime.server.openai import batches as openai_batches
from edge_runtime.server.openai import chat as openai
from edge_runtime.server.openai import files, llama_server, responses
from edge_runtime.server.registry.catalog import Catalog
from edge_runtime.server.registry.loaded import ModelRegistry
from edge_runtime.server.registry.places import FOLDER
from edge_runtime.server.settings import Settings
from edge_runtime.server.state import ServerState
from edge_runtime.version import __version__

TIDY_S = 3600.0
"""Between two searches for uploads that nobody needs."""


async def _tidy_now_and_then(catalog: Catalog) -> None:
    while True:
        await asyncio.sleep(TIDY_S)
        await asyncio.to_thread(catalog.tidy)


def create_app(settings: Settings) -> FastAPI:
    """Make the application; models are loaded at startup and on request.

    Raises
    ------
    ModelFileError
        When one of the owner's models does not exist.
    MessageError
        When a setting is out of range.
    """
    settings = settings.checked()
    catalog = Catalog(settings)
    registry = ModelRegistry(settings, catalog)
    inference = Inference(settings, registry)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)

    batches = Batches(catalog.library.root / FOLDER / "batches", settings, answer, inference.is_asked, catalog.find)
    registry.withdraw = batches.withdraw
    state = ServerState(settings, catalog, registry, inference, Metrics(inference, batches), batches)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(catalog.tidy)
        await registry.preload()
        tidying = asyncio.create_task(_tidy_now_and_then(catalog))
        batches.start()
        try:
            yield
        finally:
            tidying.cancel()
            await batches.close()
            state.inference.close()
            state.making.shutdown(wait=False, cancel_futures=True)
            await registry.close()
            await close_upstream()

    app = FastAPI(
        title="edge-runtime",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # they load scripts from a CDN; /openapi.json has the description
        redoc_url=None,
        middleware=[*idle_memory.middleware(), *envelope.middleware(), *stack.middleware(settings)],
    )
    app.state.server = state
    errors.install(app)
    close_upstream = upstream.install(app, settings)
    openai_routers = (openai.router, files.router, openai_batches.router)
    others = (anthropic.router, anthropic_batches.router, llama_server.router, system.router)
    of_page = (pages.router, page_facts.router, page_preview.router)
    for router in (ollama.router, *openai_routers, *others, *of_page):
        app.include_router(router)
    app.include_router(llama_server.without_version(openai.router, responses.router))
    return app
