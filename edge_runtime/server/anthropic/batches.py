"""Routes of Anthropic's message batches; the same store and the same work as OpenAI's (`batches.runner`).

Requests are written as lines of an input file, and results are translated from the lines of the answers when they are
asked for. Source: anthropic-sdk-python's types of `messages.batches`.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response, StreamingResponse
from typing_extensions import TypedDict  # pydantic cannot describe typing's own before Python 3.12

from edge_runtime.server import sse
from edge_runtime.server.anthropic.replies import AnthropicErrorReply
from edge_runtime.server.batches.files import Files, owner_of_files
from edge_runtime.server.batches.records import BatchRecord, new_id, now_ns
from edge_runtime.server.errors import RequestError
from edge_runtime.server.fields.loose import Loose
from edge_runtime.server.routing import JSONRoute
from edge_runtime.server.state import ServerState, State

router = APIRouter(tags=["Anthropic"], route_class=JSONRoute)
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": AnthropicErrorReply},
    "5XX": {"model": AnthropicErrorReply},
}
ROUTE, PREFIX = "/v1/messages", "msgbatch_"
MAX_REQUESTS = 100_000
WINDOW_S, KEPT_S = 86_400, 29 * 86_400
"""How long the work may take, and how long results are kept, as Anthropic has it."""
_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
LINES_AT_ONCE = 64
"""Of results, translated together."""


class BatchedRequest(Loose):
    """One request of a batch."""

    custom_id: str
    params: dict[str, Any] = Field(description="Body of a request to /v1/messages.")


class CreateRequest(Loose):
    """Body of `POST /v1/messages/batches`."""

    requests: list[BatchedRequest]

    def check(self) -> None:
        """Raise `RequestError` for what pydantic cannot check."""
        if not 0 < len(self.requests) <= MAX_REQUESTS:
            raise RequestError(
                f"requests holds {len(self.requests)} requests; expected 1 to {MAX_REQUESTS}.", "requests"
            )
        seen: set[str] = set()
        for number, request in enumerate(self.requests):
            where = f"requests.{number}"
            if not _ID.fullmatch(request.custom_id):
                raise RequestError(
                    f"{where}.custom_id is {request.custom_id[:80]!r}; expected 1 to 64 letters, digits, - and _.",
                    where,
                )
            if request.custom_id in seen:
                raise RequestError(
                    f"{where}.custom_id is {request.custom_id!r}, as one before; expected another.", where
                )
            seen.add(request.custom_id)
            if request.params.get("stream"):
                raise RequestError(
                    f"{where}.params.stream is set, but a batch has whole answers; leave it out.", where
                )

    def lines(self) -> Iterator[bytes]:
        """The input file."""
        for each in self.requests:
            line = {"custom_id": each.custom_id, "method": "POST", "url": ROUTE, "body": each.params}
            yield json.dumps(line).encode() + b"\n"


class Counts(TypedDict):
    """Requests of a batch; all are `processing` until it has ended."""

    processing: int
    succeeded: int
    errored: int
    canceled: int
    expired: int


class MessageBatch(TypedDict):
    """A batch."""

    id: str
    type: Literal["message_batch"]
    processing_status: Literal["in_progress", "canceling", "ended"]
    request_counts: Counts
    created_at: str
    expires_at: str
    ended_at: str | None
    cancel_initiated_at: str | None
    archived_at: None
    results_url: str | None


class MessageBatchList(TypedDict):
    """A page of batches."""

    data: list[MessageBatch]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Deleted(TypedDict):
    """Reply to a deletion."""

    id: str
    type: Literal["message_batch_deleted"]


def _owner(request: Request, state: ServerState) -> str:
    """Owners here are others than those of OpenAI's files: what they have is not listed there."""
    return f"anthropic {owner_of_files(request.headers, state.settings)}"


def _time(seconds: int | None) -> str | None:
    return None if seconds is None else datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()


def shown(record: BatchRecord) -> MessageBatch:
    """A batch as clients see it."""
    has_ended = not record.is_unfinished
    counts: Counts = {"processing": record.total, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
    if has_ended:
        counts = {
            "processing": 0,
            "succeeded": record.completed,
            "errored": record.failed - record.unanswered,
            "canceled": record.unanswered if record.status == "cancelled" else 0,
            "expired": record.unanswered if record.status == "expired" else 0,
        }
    status: Literal["in_progress", "canceling", "ended"] = "ended" if has_ended else "in_progress"
    if not has_ended and record.ends_as == "cancelled":
        status = "canceling"
    return {
        "id": record.id,
        "type": "message_batch",
        "processing_status": status,
        "request_counts": counts,
        "created_at": _time(record.created_at) or "",
        "expires_at": _time(record.expires_at) or "",
        "ended_at": _time(record.times.get(f"{record.status}_at")) if has_ended else None,
        "cancel_initiated_at": _time(record.times.get("cancelling_at")),
        "archived_at": None,
        # Relative, since only clients know under which address and prefix a proxy has this server.
        "results_url": f"{ROUTE}/batches/{record.id}/results" if has_ended else None,
    }


@router.post("/v1/messages/batches", response_model=None, responses={200: {"model": MessageBatch}, **ERRORS})
async def create(request: Request, state: State, body: CreateRequest) -> Response:
    """Start a batch: its requests are answered while nobody waits for an answer."""
    await asyncio.to_thread(body.check)
    batches, owner = await state.batches.opened(), _owner(request, state)

    async def chunks() -> AsyncIterator[bytes]:
        lines = body.lines()
        while piece := b"".join(islice(lines, LINES_AT_ONCE)):
            yield piece
            await asyncio.sleep(0)

    with batches.files.arriving() as arriving:
        await arriving.write(chunks())
        kept = await asyncio.to_thread(arriving.keep, owner, "requests.jsonl", "batch", WINDOW_S + KEPT_S)
    created = now_ns()
    record = BatchRecord(
        id=new_id(PREFIX),
        owner=owner,
        endpoint=ROUTE,
        input_file_id=kept.id,
        completion_window="24h",
        created_ns=created,
        expires_at=created // 10**9 + WINDOW_S,
        status="in_progress",  # checked already
        times={"in_progress_at": created // 10**9},
        total=len(body.requests),
        output_seconds=KEPT_S,
    )
    try:
        return sse.body(shown(batches.create(record)))
    except Exception:
        batches.files.delete(owner, kept.id)
        raise


@router.get("/v1/messages/batches", response_model=None, responses={200: {"model": MessageBatchList}, **ERRORS})
async def batches(
    request: Request,
    state: State,
    before_id: str | None = None,
    after_id: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> Response:
    """List batches, the newest first."""
    found = (await state.batches.opened()).all(_owner(request, state), PREFIX)[::-1]
    shift = 0
    if after_id is not None:
        found = found[_place(found, after_id, "after_id") + 1 :]
    if before_id is not None:
        found = found[: _place(found, before_id, "before_id")]
        shift = max(0, len(found) - limit) if after_id is None else 0  # those next to it
    has_more = len(found) > limit
    data = [shown(record) for record in found[shift : shift + limit]]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return sse.body({"data": data, "has_more": has_more, "first_id": first, "last_id": last})


def _place(records: Sequence[BatchRecord], name: str, param: str) -> int:
    place = next((number for number, record in enumerate(records) if record.id == name), None)
    if place is None:
        raise RequestError(f"{param} is {name[:80]!r}; expected the id of a batch in this list.", param)
    return place


@router.get(
    "/v1/messages/batches/{batch_id}", response_model=None, responses={200: {"model": MessageBatch}, **ERRORS}
)
async def batch(request: Request, state: State, batch_id: str) -> Response:
    """How far a batch is."""
    return sse.body(shown((await state.batches.opened()).get(_owner(request, state), batch_id, PREFIX)))


@router.post(
    "/v1/messages/batches/{batch_id}/cancel", response_model=None, responses={200: {"model": MessageBatch}, **ERRORS}
)
async def cancel(request: Request, state: State, batch_id: str) -> Response:
    """Cancel a batch; its answers so far are kept."""
    return sse.body(shown((await state.batches.opened()).cancel(_owner(request, state), batch_id, PREFIX)))


@router.delete("/v1/messages/batches/{batch_id}", response_model=None, responses={200: {"model": Deleted}, **ERRORS})
async def delete(request: Request, state: State, batch_id: str) -> Response:
    """Delete a batch that has ended, with its results."""
    batches, owner = await state.batches.opened(), _owner(request, state)
    record = batches.get(owner, batch_id, PREFIX)
    batches.forget(owner, batch_id, PREFIX)
    names = [name for name in (record.input_file_id, record.output_file_id, record.error_file_id) if name]
    await asyncio.to_thread(batches.files.delete_all, owner, names)
    return sse.body({"id": record.id, "type": "message_batch_deleted"})


@router.get(
    "/v1/messages/batches/{batch_id}/results",
    response_model=None,
    responses={200: {"content": {"application/x-jsonl": {}}}, **ERRORS},
)
async def results(request: Request, state: State, batch_id: str) -> Response:
    """The results of a batch that has ended, one a line."""
    batches, owner = await state.batches.opened(), _owner(request, state)
    record = batches.get(owner, batch_id, PREFIX)
    if record.is_unfinished:
        raise RequestError(
            f"The batch {record.id} has not ended; ask for its results once processing_status is ended."
        )
    paths = _paths(batches.files, owner, record)
    return StreamingResponse(_results(paths), media_type="application/x-jsonl")


def _paths(files: Files, owner: str, record: BatchRecord) -> list[Path]:
    names = [name for name in (record.output_file_id, record.error_file_id) if name is not None]
    return [files.path(files.get(owner, name)) for name in names]


def _results(paths: Sequence[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            for data in file:
                yield sse.as_json(result(json.loads(data))).encode() + b"\n"


def result(line: dict[str, Any]) -> dict[str, Any]:
    """Anthropic's form of a line with an answer."""
    response, error = line["response"], line["error"]
    if error is not None:
        kind = "canceled" if error["code"] == "batch_cancelled" else "expired"
        return {"custom_id": line["custom_id"], "result": {"type": kind}}
    body = response["body"]
    if response["status_code"] == 200:
        return {"custom_id": line["custom_id"], "result": {"type": "succeeded", "message": body}}
    if body.get("type") != "error":
        message = body.get("error", {}).get("message", "Something went wrong inside the server; see its log.")
        body = {"type": "error", "error": {"type": "api_error", "message": message}}
    return {"custom_id": line["custom_id"], "result": {"type": "errored", "error": body}}
