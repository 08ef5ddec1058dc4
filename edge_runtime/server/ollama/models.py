"""Ollama's routes about models: list, show, ps, pull, create, copy, delete, blobs; embeddings are refused."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from edge_runtime.answers import TOY_NOTICE
from edge_runtime.errors import ModelFileError
from edge_runtime.server.errors import RequestError, error_line
from edge_runtime.server.middleware.shares import asking
from edge_runtime.server.ollama import create as making
from edge_runtime.server.ollama.modelfile import modelfile_of
from edge_runtime.server.ollama.options import parameter_lines
from edge_runtime.server.ollama.requests import CopyBody, CreateBody, DeleteBody, EmbedBody, PullBody, ShowBody
from edge_runtime.server.registry.catalog import Catalog, Listed
from edge_runtime.server.registry.facts import Facts, details, facts_of, fingerprint
from edge_runtime.server.registry.loaded import Slot
from edge_runtime.server.replies import NDJSON, while_connected
from edge_runtime.server.routing import JSONRoute
from edge_runtime.server.settings import Settings
from edge_runtime.server.state import State
from edge_runtime.store.names import plain_name

router = APIRouter(route_class=JSONRoute)

FOR_EVER = datetime.datetime(2318, 1, 1, tzinfo=datetime.UTC)
"""Reported expiry of a model that stays loaded; Ollama reports a date as distant."""


@router.get("/tags")
async def tags(state: State) -> dict[str, Any]:
    """List the models of this machine."""
    return {"models": await asyncio.to_thread(_listings, state.catalog, state.settings)}


def _listings(catalog: Catalog, settings: Settings) -> list[dict[str, Any]]:
    """All models except those with damaged files, which cannot be used."""
    found = []
    for listed in catalog.all():
        with contextlib.suppress(ModelFileError, OSError):
            found.append(_listing(listed, settings))
    return found


def _listing(listed: Listed, settings: Settings) -> dict[str, Any]:
    facts = facts_of(listed)
    return {
        "name": listed.tag,
        "model": listed.tag,
        "modified_at": listed.modified.isoformat(),
        "size": listed.size,
        "digest": fingerprint(listed),
        "details": details(listed, facts),
        "capabilities": facts.capabilities(settings),
    }


@router.get("/ps")
async def running(state: State) -> dict[str, Any]:
    """List the models in memory."""
    slots = state.registry.loaded()
    return {"models": await asyncio.to_thread(lambda: [_running(slot) for slot in slots])}


def _running(slot: Slot) -> dict[str, Any]:
    facts = facts_of(slot.listed)
    expires = FOR_EVER
    if slot.keep_alive_s >= 0:  # while in use: as if the answer ended now
        when = slot.expires_at or time.time() + slot.keep_alive_s
        expires = datetime.datetime.fromtimestamp(when, datetime.UTC)
    return {
        "name": slot.listed.tag,
        "model": slot.listed.tag,
        "size": slot.n_bytes,
        "digest": fingerprint(slot.listed),
        "details": details(slot.listed, facts),
        "expires_at": expires.isoformat(timespec="microseconds"),
        "size_vram": 0,
        "context_length": slot.model.n_ctx if slot.model is not None else 0,
    }


@router.post("/show")
async def show(body: ShowBody, state: State) -> dict[str, Any]:
    """Describe a model."""

    def describe() -> dict[str, Any]:
        listed = state.catalog.find(body.wanted)
        facts = facts_of(listed)
        return {**_description(listed, facts), "capabilities": facts.capabilities(state.settings)}

    return await asyncio.to_thread(describe)


def _description(listed: Listed, facts: Facts) -> dict[str, Any]:
    texts = {"system": listed.system, "template": listed.template, "license": listed.license}
    modelfile = modelfile_of(
        listed.parent or listed.tag, **texts, parameters=listed.parameters, messages=listed.messages
    )
    return {
        "modelfile": modelfile,
        "parameters": parameter_lines(listed.parameters),
        "template": listed.template or facts.template,
        "system": listed.system,
        "license": listed.license,
        "details": details(listed, facts),
        "messages": [*listed.messages],
        "model_info": {**facts.decoder, "general.parameter_count": facts.parameters},
        "projector_info": dict(facts.projector),
        **({"notice": TOY_NOTICE} if facts.is_toy else {}),
        "modified_at": listed.modified.isoformat(),
    }


@router.post("/pull")
async def pull(body: PullBody, request: Request, state: State) -> Response:
    """Fetch a model into the store, with progress reports."""
    name = making.pullable(plain_name(body.wanted), state)
    return await _steps(making.pull(name, state), request, stream=body.stream is not False)


@router.post("/create")
async def create(body: CreateBody, request: Request, state: State) -> Response:
    """Make a model from files that are here, with its own texts and options."""
    return await _steps(making.create(body, state.catalog, state.making), request, stream=body.stream is not False)


async def _steps(steps: AsyncIterator[dict[str, Any]], request: Request, *, stream: bool) -> Response:
    """Reports of a long task: all of them as they come, or only the last one."""
    if not stream:
        last: dict[str, Any] = {}

        async def through() -> None:
            async for step in steps:
                last.clear()
                last.update(step)

        await while_connected(request, through())
        return JSONResponse(last)
    first = await anext(steps)  # an error before the first report gets its own status

    async def lines() -> AsyncIterator[str]:
        try:
            yield json.dumps(first) + "\n"
            async for step in steps:
                yield json.dumps(step) + "\n"
        except Exception as error:  # noqa: BLE001 - the status is already sent: report it in the stream
            yield error_line(error, "ollama") + "\n"

    return StreamingResponse(lines(), media_type=NDJSON)


@router.post("/copy")
async def copy(body: CopyBody, state: State) -> Response:
    """Give a model another name."""
    await asyncio.to_thread(state.catalog.copy, body.source, body.destination)
    return Response()


@router.delete("/delete")
async def delete(body: DeleteBody, state: State) -> Response:
    """Delete a model's name, and its files if no other name needs them."""
    if not body.wanted:
        raise RequestError("The request names no model; expected its name as 'model'.", "model")
    listed = await asyncio.to_thread(state.catalog.delete, body.wanted)
    left = {other.files for other in await asyncio.to_thread(state.catalog.all)}
    if listed is not None and listed.files not in left:
        await state.registry.forget(listed)
    return Response()


@router.head("/blobs/{digest}")
async def has_blob(digest: str, state: State) -> Response:
    """Say whether an upload exists."""
    return Response(status_code=200 if state.catalog.blobs.has(digest) else 404)


@router.post("/blobs/{digest}", status_code=201)
async def receive_blob(digest: str, request: Request, state: State) -> Response:
    """Receive an upload whose contents have this digest."""
    announced = request.headers.get("content-length", "")
    length = int(announced) if announced.isascii() and announced.isdecimal() else None
    leave = state.uploads.take(asking())
    try:
        if not state.catalog.blobs.has(digest):
            await state.catalog.blobs.receive(digest, request.stream(), length)
    finally:
        leave()
    return Response(status_code=201)


@router.post("/embed")
@router.post("/embeddings")
async def embed(body: EmbedBody, state: State) -> Response:
    """Refuse: the model makes no embeddings."""
    listed = state.catalog.find(body.wanted)
    raise RequestError(
        f"{listed.name} does not support embeddings; it answers questions. Use an embedding model on another server.",
        "model",
    )
