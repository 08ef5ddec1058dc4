"""JSON objects → server-sent events and bodies, whatever characters a client sent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from edge_runtime.engine.events import Progress

DESCRIBED: dict[str, Any] = {"text/event-stream": {}}
"""A stream in OpenAPI's description of replies; version 3.1 cannot describe its events."""
DONE = "data: [DONE]\n\n"
BEAT = ": working\n\n"
"""A comment, which clients skip: it shows that the connection is alive."""


def beat(progress: Progress | None = None) -> str:
    """A comment; one with a stage of the work, how many of its parts are done, and its share from 0 to 1 if known."""
    if progress is None:
        return BEAT
    return f": working {progress.stage} {progress.done} {progress.total} {progress.share:.4f}\n\n"


def as_json(value: Any) -> str:
    """JSON in which halves of surrogate pairs, which JSON may hold and UTF-8 may not, are U+FFFD."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def event(value: Mapping[str, Any], *, named: bool = False) -> str:
    """One event.

    Parameters
    ----------
    named : put its `type` before it, too, as clients of typed events expect it.
    """
    name = f"event: {value['type']}\n" if named else ""
    return f"{name}data: {as_json(value)}\n\n"


def body(value: Mapping[str, Any] | Sequence[Any]) -> Response:
    """A whole reply."""
    return Response(as_json(value), media_type="application/json")
