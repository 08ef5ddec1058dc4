"""Bytes of a body → the value for a route, unless it is larger than any request needs; off the event loop.

A JSON value takes up to a hundred times the memory of its bytes, `[],[],[],…` being the worst case, and no other
request is served while it is parsed. So values are counted before parsing, by the commas and opening brackets outside
of strings. Large bodies are parsed, counted and validated in a thread.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from fastapi._compat import ModelField
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Receive, Scope

from edge_runtime.server.settings import Settings

SHORT_BYTES = 16_384
"""Parsed at once: handing it to a thread would take longer."""
CONVERSATIONS = ("messages", "input")
"""Fields that hold a list of messages, whose contents are lists of parts."""

_NO_BACKSLASH = re.compile(rb"[^\\]")
PIECE_BYTES = 1 << 18
"""Bytes scanned at a time; other threads run in between."""


class JSONRequest(Request):
    """A request whose body is JSON.

    Parameters
    ----------
    field : the expected type. A large body is validated here, and FastAPI accepts the resulting value as it is.
    """

    def __init__(self, scope: Scope, receive: Receive, field: ModelField | None, settings: Settings) -> None:
        super().__init__(scope, receive)
        self._field, self._settings = field, settings
        self.refusal: RequestValidationError | None = None
        """Why a large body is invalid; FastAPI would replace it by a sentence of its own."""

    async def json(self) -> Any:
        """The value; raises HTTPException when it is too large, JSONDecodeError when it is not JSON."""
        if not hasattr(self, "_json"):
            body = await self.body()
            if len(body) <= SHORT_BYTES:
                self._json = read(body, self._settings)
            else:
                self._json = await asyncio.to_thread(self._validated, body)
        return self._json

    def _validated(self, body: bytes) -> Any:
        value = read(body, self._settings)
        if self._field is None:
            return value
        found, errors = self._field.validate(value, {}, loc=("body",))
        if errors:
            self.refusal = RequestValidationError(errors[:1])
            raise self.refusal
        return found


def read(body: bytes, settings: Settings) -> Any:
    """Parse a body; raises as `JSONRequest.json`."""
    limit = settings.max_values
    if _separators(body) > limit and _n_values(body, limit) > limit:
        raise HTTPException(
            413, f"The body holds more than {limit} values, which is the limit; send fewer or shorter messages."
        )
    too_deep = HTTPException(
        400,
        f"The body has more than {settings.max_depth} levels of lists and objects; expected less nesting.",
    )
    try:
        value = json.loads(body)
    except RecursionError:
        raise too_deep from None
    except UnicodeDecodeError:
        raise HTTPException(400, "The body is not valid UTF-8; expected one JSON object.") from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # more digits than Python reads, since that takes quadratic time
        raise HTTPException(
            400, f"The body holds a whole number of more than {sys.get_int_max_str_digits()} digits; shorten it."
        ) from None
    level = [value]
    for _ in range(settings.max_depth):
        level = (
            [
                inner
                for outer in level
                for inner in (outer.values() if isinstance(outer, dict) else outer)
                if isinstance(inner, dict | list)
            ]
            if isinstance(value, dict | list)
            else []
        )
        if not level:
            check_counts(value, settings)
            return value
    raise too_deep


def check_counts(value: Any, settings: Settings) -> None:
    """Refuse conversations of too many messages, and messages of too many parts.

    Raises
    ------
    HTTPException
        With status 413.
    """
    for name in CONVERSATIONS if isinstance(value, Mapping) else ():
        messages = value.get(name)
        if not isinstance(messages, list):
            continue
        if len(messages) > settings.max_messages:
            raise HTTPException(
                413,
                f"{name} holds {len(messages)} messages, at most {settings.max_messages} are accepted; send fewer.",
            )
        for message in messages:
            content = message.get("content") if isinstance(message, Mapping) else None
            if isinstance(content, list) and len(content) > settings.max_parts:
                raise HTTPException(
                    413, f"A message has {len(content)} parts, at most {settings.max_parts} are accepted; send fewer."
                )


def _separators(data: bytes) -> int:
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def _n_values(body: bytes, limit: int) -> int:
    """Count commas and opening brackets outside of strings, until there are more than `limit`."""
    found, start, is_inside = 0, 0, False
    while start < len(body) and found <= limit:
        end = start + PIECE_BYTES
        if body[end - 1 : end] == b"\\":  # keep it together with what it escapes
            behind = _NO_BACKSLASH.search(body, end)
            end = len(body) if behind is None else behind.end()
        piece = body[start:end].replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.split(b'"')
        found += sum(map(_separators, parts[is_inside::2]))
        is_inside ^= len(parts) % 2 == 0
        start = end
    return found
