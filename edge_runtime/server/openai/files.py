"""Routes of OpenAI's files: inputs of batches, and their answers; see `batches.files`."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, Response

from edge_runtime.server import sse
from edge_runtime.server.batches.files import owner_of_files, too_large
from edge_runtime.server.batches.records import FileRecord
from edge_runtime.server.errors import RequestError
from edge_runtime.server.middleware.bodies import FORM_BYTES
from edge_runtime.server.middleware.shares import asking
from edge_runtime.server.openai import reply_types as shapes
from edge_runtime.server.openai.file_types import FileDeleted, FileObject
from edge_runtime.server.openai.forms import Form
from edge_runtime.server.openai.lists import IdList, page
from edge_runtime.server.state import ServerState, State

router = APIRouter(tags=["OpenAI"])
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": shapes.ErrorReply}, "5XX": {"model": shapes.ErrorReply}}
OTHER_PURPOSES = ("assistants", "evals", "fine-tune", "user_data", "vision")
SECONDS = (3600, 2_592_000)
"""How long files may be kept: an hour to 30 days."""
KEPT_S = SECONDS[1]
"""Without another wish, as OpenAI keeps those of batches."""
FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": SECONDS[0], "maximum": SECONDS[1]},
                    },
                }
            }
        },
    }
}


def owner(request: Request, state: ServerState) -> str:
    """Whose files and batches a request may see."""
    return owner_of_files(request.headers, state.settings)


def shown(record: FileRecord) -> FileObject:
    """A file as clients see it."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.n_bytes,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
        "status_details": None,
    }


@router.post("/v1/files", response_model=None, responses={200: {"model": FileObject}, **ERRORS}, openapi_extra=FORM)
async def upload(request: Request, state: State) -> Response:
    """Upload the requests of a batch: one JSON object a line."""
    form = Form(request.headers.get("content-type", ""))
    files = (await state.batches.opened()).files
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > files.max_file_bytes + FORM_BYTES:
        raise too_large(files.max_file_bytes)
    leave = state.uploads.take(asking())
    try:
        with files.arriving() as arriving:
            await arriving.write(form.file(request.stream()))
            purpose, seconds = _purpose(form.fields), _seconds(form.fields)
            kept = await asyncio.to_thread(
                arriving.keep, owner(request, state), form.filename or "upload", purpose, seconds
            )
    finally:
        leave()
    return sse.body(shown(kept))


def _purpose(fields: dict[str, str]) -> str:
    found = fields.get("purpose")
    if found == "batch":
        return found
    if found is None:
        raise RequestError("purpose is missing; expected batch.", "purpose")
    why = "files here are requests of batches" if found in OTHER_PURPOSES else "there is no such purpose"
    raise RequestError(f"purpose is {found[:80]!r}, but {why}; expected batch.", "purpose")


def _seconds(fields: dict[str, str]) -> int:
    anchor, text = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and text is None:
        if "expires_after" in fields:
            raise RequestError(
                "expires_after is one field; expected expires_after[anchor] and expires_after[seconds].",
                "expires_after",
            )
        return KEPT_S
    if anchor != "created_at":
        given = "missing" if anchor is None else repr(anchor[:80])
        raise RequestError(f"expires_after[anchor] is {given}; expected created_at.", "expires_after.anchor")
    number = int(text) if text is not None and text.isascii() and text.isdecimal() and len(text) < 12 else None
    return checked_seconds(number, (text or "missing")[:80], "expires_after.seconds")


def checked_seconds(number: int | None, found: str, param: str) -> int:
    """How long a file is kept.

    Raises
    ------
    RequestError
    """
    if number is None or not SECONDS[0] <= number <= SECONDS[1]:
        raise RequestError(f"{param} is {found}; expected a number from {SECONDS[0]} to {SECONDS[1]}.", param)
    return number


@router.get("/v1/files", response_model=None, responses={200: {"model": IdList}, **ERRORS})
async def files(
    request: Request,
    state: State,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> Response:
    """List files."""
    found = (await state.batches.opened()).files.all(owner(request, state), purpose)
    return sse.body(page([shown(record) for record in found], order=order, after=after, limit=limit))


@router.get("/v1/files/{file_id}", response_model=None, responses={200: {"model": FileObject}, **ERRORS})
async def file(request: Request, state: State, file_id: str) -> Response:
    """Describe a file."""
    return sse.body(shown((await state.batches.opened()).files.get(owner(request, state), file_id)))


@router.get(
    "/v1/files/{file_id}/content",
    response_model=None,
    responses={200: {"content": {"application/octet-stream": {}}}, **ERRORS},
)
async def content(request: Request, state: State, file_id: str) -> Response:
    """The contents of a file."""
    files = (await state.batches.opened()).files
    record = files.get(owner(request, state), file_id)
    return FileResponse(files.path(record), media_type="application/octet-stream", filename=f"{record.id}.jsonl")


@router.delete("/v1/files/{file_id}", response_model=None, responses={200: {"model": FileDeleted}, **ERRORS})
async def delete(request: Request, state: State, file_id: str) -> Response:
    """Delete a file; not while a batch reads it."""
    files = (await state.batches.opened()).files
    await asyncio.to_thread(files.delete, owner(request, state), file_id)
    return sse.body({"id": file_id, "object": "file", "deleted": True})
