"""Lists that clients read page by page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic cannot describe typing's own before Python 3.12

from edge_runtime.server.errors import RequestError


class IdList(TypedDict):
    """A page of objects."""

    object: Literal["list"]
    data: list[Any]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page(
    objects: Sequence[Mapping[str, Any]], *, order: Literal["asc", "desc"], after: str | None, limit: int
) -> IdList:
    """A page.

    Parameters
    ----------
    objects : the oldest first.
    after : id of the object that precedes the page, in the requested order.

    Raises
    ------
    RequestError
        When there is no such object.
    """
    found = [*objects] if order == "asc" else [*reversed(objects)]
    if after is not None:
        place = next((number for number, each in enumerate(found) if each["id"] == after), None)
        if place is None:
            raise RequestError(f"after is {after[:80]!r}; expected the id of an object in this list.", "after")
        found = found[place + 1 :]
    data = found[:limit]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": len(found) > len(data)}
