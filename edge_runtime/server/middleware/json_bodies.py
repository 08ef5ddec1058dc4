"""Bytes of a body → what a route takes, if it is not more than a request needs; off the event loop.

A value of JSON takes a hundred times the memory of its bytes, `[],[],[],…` being the worst, and no other request is
heard while it is made. So values are counted before they are made: by what separates and opens them, outside of
strings. What is large is read, measured and validated in a thread.
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
"""Read on the spot: handing it to a thread would take longer."""
CONVERSATIONS = ("messages", "input")
"""Fields that hold a list of messages, whose contents are lists of parts."""

_NO_BACKSLASH = re.compile(rb"[^\\]")
PIECE_BYTES = 1 << 18
"""So much is looked at in one go; between two of them, other threads have their turn."""


class JSONRequest(Request):
    """A request whose body is JSON.

    Parameters
    ----------
    field : what it has to be; of a large body that is found out here, and a value of its type is handed on, which
        FastAPI takes as it is.
    """

    def __init__(self, scope: Scope, receive: Receive, field: ModelField | None, settings: Settings) -> None:
        super().__init__(scope, receive)
        self._field, self._settings = field, settings
        self.refusal: RequestValidationError | None = None
        """Why a large body is not what it has to be; FastAPI would replace it by a sentence of its own."""

    async def json(self) -> Any:
        """The value; HTTPException where there is too much of it, JSONDecodeError where it is none."""
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
    """Read a body; raises as `JSONRequest.json`."""
    most = settings.max_values
    if _separators(body) > most and _n_values(body, most) > most:
        raise HTTPException(
            413, f"The body holds more than {most} values, which is the limit; send fewer or shorter messages."
        )
    too_deep = HTTPException(
        400,
        f"The body has more than {settings.max_depth} lists and objects inside of each other; expected less nesting.",
    )
    try:
        value = json.loads(body)
    except RecursionError:
        raise too_deep from None
    except UnicodeDecodeError:
        raise HTTPException(400, "The body is not valid UTF-8; expected one JSON object.") from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # more digits than Python reads, which takes the square of their number in time
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
                413, f"{name} holds {len(messages)} messages, at most {settings.max_messages} are taken; send fewer."
            )
        for message in messages:
            content = message.get("content") if isinstance(message, Mapping) else None
            if isinstance(content, list) and len(content) > settings.max_parts:
                raise HTTPException(
                    413, f"A message has {len(content)} parts, at most {settings.max_parts} are taken; send fewer."
                )


def _separators(data: bytes) -> int:
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def _n_values(body: bytes, most: int) -> int:
    """What separates and opens values outside of strings, counted until there is more than enough of it."""
    found, start, is_inside = 0, 0, False
    while start < len(body) and found <= most:
        end = start + PIECE_BYTES
        if body[end - 1 : end] == b"\\":  # what it escapes belongs to it
            behind = _NO_BACKSLASH.search(body, end)
            end = len(body) if behind is None else behind.end()
        piece = body[start:end].replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.split(b'"')
        found += sum(map(_separators, parts[is_inside::2]))
        is_inside ^= len(parts) % 2 == 0
        start = end
    return found
