"""Bytes of a body → the JSON value in them, if it is not more than a request needs; off the event loop.

A value of JSON takes a hundred times the memory of its bytes, `[],[],[],…` being the worst, and no other request is
heard while it is made. So values are counted before they are made: by what separates and opens them, outside of
strings.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

MOST_VALUES = 100_000
"""Values in one body, those inside of others counted; a conversation of a thousand messages has ten thousand."""
MOST_DEPTH = 200
"""Lists and objects inside of each other; further ones are no request of any API here."""
SHORT_BYTES = 16_384
"""Read on the spot: handing it to a thread would take longer."""

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


class JSONRequest(Request):
    """A request whose body is JSON."""

    async def json(self) -> Any:
        """The value; HTTPException where there is too much of it, JSONDecodeError where it is none."""
        if not hasattr(self, "_json"):
            body = await self.body()
            self._json = read(body) if len(body) <= SHORT_BYTES else await asyncio.to_thread(read, body)
        return self._json


def read(body: bytes) -> Any:
    """Read a body; raises as `JSONRequest.json`."""
    if _separators(body) > MOST_VALUES and _separators(_STRING.sub(b"", body)) > MOST_VALUES:
        raise HTTPException(
            413, f"The body holds more than {MOST_VALUES} values, which is the limit; send fewer or shorter messages."
        )
    too_deep = HTTPException(
        400, f"The body has more than {MOST_DEPTH} lists and objects inside of each other; expected less nesting."
    )
    try:
        value = json.loads(body)
    except RecursionError:
        raise too_deep from None
    level = [value]
    for _ in range(MOST_DEPTH):
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
            return value
    raise too_deep


def _separators(data: bytes) -> int:
    return data.count(b",") + data.count(b"[") + data.count(b"{")
