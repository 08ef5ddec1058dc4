"""Routes of OpenAI's batches; see `batches.runner`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response

from edge_runtime.server import sse
from edge_runtime.server.batches.lines import ENDPOINTS
from edge_runtime.server.batches.records import BatchRecord, new_id, now_ns
from edge_runtime.server.errors import RequestError
from edge_runtime.server.fields.loose import Loose
from edge_runtime.server.openai.file_types import Batch, BatchErrors
from edge_runtime.server.openai.files import ERRORS, KEPT_S, checked_seconds, owner
from edge_runtime.server.openai.lists import IdList, page
from edge_runtime.server.routing import JSONRoute
from edge_runtime.server.state import State

router = APIRouter(tags=["OpenAI"], route_class=JSONRoute)
WINDOW = re.compile(r"([1-9][0-9]{0,2})([hd])")
MAX_WINDOW_S = 30 * 86_400
TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
MAX_METADATA = 16


class OutputExpiresAfter(Loose):
    """How long the files with answers are kept."""

    anchor: Literal["created_at"]
    seconds: int


class BatchRequest(Loose):
    """Body of `POST /v1/batches`."""

    input_file_id: str
    endpoint: str = Field(description=f"One of {', '.join(ENDPOINTS)}.")
    completion_window: str = Field("24h", description="24h, as OpenAI has it; here also other hours, or days: 7d.")
    metadata: dict[str, str] | None = None
    output_expires_after: OutputExpiresAfter | None = None

    def window_s(self) -> int:
        """Seconds in which it has to be done.

        Raises
        ------
        RequestError
        """
        found = WINDOW.fullmatch(self.completion_window)
        seconds = 0 if found is None else int(found[1]) * (3600 if found[2] == "h" else 86_400)
        if not 0 < seconds <= MAX_WINDOW_S:
            raise RequestError(
                f"completion_window is {self.completion_window[:80]!r}; expected 24h, or another number of hours or "
                "days (7d), at most 30d.",
                "completion_window",
            )
        return seconds

    def check(self) -> None:
        """Raise `RequestError` for what pydantic cannot check."""
        if self.endpoint not in ENDPOINTS:
            raise RequestError(f"endpoint is {self.endpoint[:80]!r}; expected {' or '.join(ENDPOINTS)}.", "endpoint")
        metadata = self.metadata or {}
        if len(metadata) > MAX_METADATA or any(len(k) > 64 or len(v) > 512 for k, v in metadata.items()):
            raise RequestError(
                f"metadata is too large; expected at most {MAX_METADATA} names of at most 64 characters, with values "
                "of at most 512.",
                "metadata",
            )

    def output_seconds(self) -> int:
        """How long the files with answers are kept."""
        if self.output_expires_after is None:
            return KEPT_S
        seconds = self.output_expires_after.seconds
        return checked_seconds(seconds, str(seconds)[:80], "output_expires_after.seconds")


def shown(record: BatchRecord) -> Batch:
    """A batch as clients see it."""
    errors: BatchErrors | None = (
        {"object": "list", "data": [dict(error) for error in record.errors]} if record.errors else None
    )
    is_over = not record.is_unfinished  # until then, the files may not be there
    found: Any = {
        "id": record.id,
        "object": "batch",
        "endpoint": record.endpoint,
        "model": record.model,
        "errors": errors,
        "input_file_id": record.input_file_id,
        "completion_window": record.completion_window,
        "status": record.status,
        "output_file_id": record.output_file_id if is_over else None,
        "error_file_id": record.error_file_id if is_over else None,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        **{f"{name}_at": record.times.get(f"{name}_at") for name in TIMES},
        "request_counts": {"total": record.total, "completed": record.completed, "failed": record.failed},
        "metadata": record.metadata,
    }
    reply: Batch = found
    return reply


@router.post("/v1/batches", response_model=None, responses={200: {"model": Batch}, **ERRORS})
async def create(request: Request, state: State, body: BatchRequest) -> Response:
    """Start a batch: its lines are answered while nobody waits for an answer."""
    body.check()
    created, window_s = now_ns(), body.window_s()
    record = BatchRecord(
        id=new_id("batch_"),
        owner=owner(request, state),
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        completion_window=body.completion_window,
        created_ns=created,
        expires_at=created // 10**9 + window_s,
        metadata=body.metadata,
        output_seconds=body.output_seconds(),
    )
    return sse.body(shown((await state.batches.opened()).create(record)))


@router.get("/v1/batches", response_model=None, responses={200: {"model": IdList}, **ERRORS})
async def batches(
    request: Request, state: State, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> Response:
    """List batches, the newest first."""
    found = (await state.batches.opened()).all(owner(request, state))
    return sse.body(page([shown(record) for record in found], order="desc", after=after, limit=limit))


@router.get("/v1/batches/{batch_id}", response_model=None, responses={200: {"model": Batch}, **ERRORS})
async def batch(request: Request, state: State, batch_id: str) -> Response:
    """How far a batch is."""
    return sse.body(shown((await state.batches.opened()).get(owner(request, state), batch_id)))


@router.post("/v1/batches/{batch_id}/cancel", response_model=None, responses={200: {"model": Batch}, **ERRORS})
async def cancel(request: Request, state: State, batch_id: str) -> Response:
    """Cancel a batch; its answers so far are kept."""
    return sse.body(shown((await state.batches.opened()).cancel(owner(request, state), batch_id)))
