"""An item and its answer → a line; and a line → what it records."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from edge_runtime.answers import Answer
from edge_runtime.batch.items import Item

_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
_UNASKED = ("logprobs", "end_logprobs", "prompt_logprobs")


@dataclass(frozen=True)
class Recorded:
    """What a line says of its item."""

    id: str
    asked: str
    """Empty where lines do not have it."""
    is_error: bool


Reader = Callable[[bytes], Recorded | None]
"""Reads a line; None if it is no line of a batch."""


def line_of(item: Item, found: Answer | Any) -> bytes:
    """The line of an answer, or of a failure (anything with `kind` and `reason`); ends with a line feed.

    Its fields are `id`, `input` and `page` of the item, `asked`, `error`, and those of `run --json`; after a failure,
    `answer` is null and `error` has `type` and `message`.
    """
    line: dict[str, Any] = {"id": item.id, **item.about, "asked": item.asked}
    if isinstance(found, Answer):
        fields = {name: value for name, value in asdict(found).items() if value is not None or name not in _UNASKED}
        line |= {"error": None} | fields
    else:
        line |= {"error": {"type": found.kind, "message": found.reason}, "answer": None}
    return encoded(line)


def encoded(line: dict[str, Any]) -> bytes:
    """JSON in UTF-8 with one line feed, at its end; names of files that are not UTF-8 keep their bytes as escapes."""
    try:
        return json.dumps(line, ensure_ascii=False).translate(_LINE_ENDS).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(line).encode() + b"\n"


def read_line(data: bytes) -> Recorded | None:
    """What a line of `line_of` records."""
    try:
        value = json.loads(data)
        found = Recorded(value["id"], value["asked"], value["error"] is not None)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return found if isinstance(found.id, str) and isinstance(found.asked, str) and "answer" in value else None
