"""Items of a conversation as the responses API lists them: with ids, and content in one spelling.

Source: openai-python's types of `input_items`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic cannot describe typing's own before Python 3.12

from edge_runtime.server.errors import RequestError
from edge_runtime.server.reply_parts import new_id

Item = dict[str, Any]
_PREFIXES = {"function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_"}


class ItemList(TypedDict):
    """A page of items."""

    object: Literal["list"]
    data: list[Item]
    first_id: str
    last_id: str
    has_more: bool


class Deleted(TypedDict):
    """Reply to a deletion."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


def listed_items(items: Sequence[Mapping[str, Any]]) -> list[Item]:
    """Items of a request in the form in which they are stored and listed."""
    return [_listed(item) for item in items]


def _listed(item: Mapping[str, Any]) -> Item:
    kind = item.get("type") or "message"
    found = {**item, "type": kind, "id": item.get("id") or new_id(_PREFIXES.get(kind, "msg_"))}
    if kind != "reasoning":
        found.setdefault("status", "completed")
    else:
        found.setdefault("summary", [])
    if kind == "message":
        texts = "output_text" if item.get("role") == "assistant" else "input_text"
        content = item.get("content")
        parts = [content] if isinstance(content, str) else content or []
        found["content"] = [_part(part, texts) for part in parts]
    return found


def _part(part: Any, texts: str) -> Any:
    """A part in the spelling of this API; clients mix in that of chat completions."""
    if isinstance(part, str):
        part = {"type": texts, "text": part}
    if part.get("type") in ("text", "input_text", "output_text"):
        return {**part, "type": texts} | ({"annotations": []} if texts == "output_text" else {})
    if part.get("type") in ("image_url", "input_image"):
        found = part.get("image_url")
        inner = found if isinstance(found, Mapping) else {"url": found}
        detail = inner.get("detail") or part.get("detail") or "auto"
        rest = {name: value for name, value in part.items() if name not in ("type", "image_url", "detail")}
        return {"type": "input_image", "image_url": inner.get("url"), "detail": detail, **rest}
    return dict(part)


def page(items: Sequence[Item], *, order: Literal["asc", "desc"], after: str | None, limit: int) -> ItemList:
    """A page of items.

    Parameters
    ----------
    items : the oldest first.
    after : id of the item that precedes the page, in the requested order.

    Raises
    ------
    RequestError
        When there is no such item.
    """
    found = [*items] if order == "asc" else [*reversed(items)]
    if after is not None:
        place = next((number for number, item in enumerate(found) if item["id"] == after), None)
        if place is None:
            raise RequestError(
                f"after is {after[:80]!r}, which is not one of the items; expected the id of one.", "after"
            )
        found = found[place + 1 :]
    shown = found[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else "",
        "last_id": shown[-1]["id"] if shown else "",
        "has_more": len(found) > len(shown),
    }
