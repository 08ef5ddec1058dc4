"""Responses of the last hours, in memory, so that clients can continue them by id.

What enters: a finished response and its input items. What leaves: items of conversations. Only the key that asked for
a response can see it. Responses are lost when the server ends, and earlier when there are too many, too large, or too
old ones. Age counts from the last use: a conversation keeps the responses that it continues.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from edge_runtime.server.errors import RequestError, ServerError

MAX_RESPONSES = 1000
MAX_BYTES = 64 << 20
"""For all items as JSON, pictures included."""
MAX_AGE_S = 6 * 3600.0
"""Since the last use."""
MAX_CHAIN = 1000
"""Longest chain of responses that continue each other."""
Item = dict[str, Any]


class NotKept(ServerError):  # noqa: N818 - says what is the matter
    """A response or an item that is not stored, or no longer."""

    status = 404

    def __init__(self, what: str, found: str, param: str | None = None) -> None:
        super().__init__(
            f"{what} {found[:80]!r} is not stored here: this server keeps the last {MAX_RESPONSES} responses of a "
            f"key, {MAX_BYTES >> 20} MB at most, for {MAX_AGE_S / 3600:g} hours after their last use and until it "
            "ends, unless they were asked for with store: false; send the whole conversation as 'input'."
        )
        self.param = param


class PreviousNotKept(NotKept):
    """The response that a request wanted to continue."""

    status, code = 400, "previous_response_not_found"


@dataclass
class _Kept:
    owner: str
    response: Mapping[str, Any]
    own_input: Sequence[Item]
    """Items of this request alone, each with an id."""
    previous: str | None
    n_bytes: int
    used: float = field(default_factory=time.monotonic)

    @property
    def items(self) -> list[Item]:
        return [*self.own_input, *self.response["output"]]


class ResponseStore:
    """Used by the event loop's thread alone."""

    def __init__(
        self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES, max_age_s: float = MAX_AGE_S
    ) -> None:
        self._max_responses, self._max_bytes, self._max_age_s = max_responses, max_bytes, max_age_s
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        """By id, least recently used first."""
        self._items: dict[str, dict[str, None]] = {}
        """Id of an item → ids of the responses that have it: clients send items again."""
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, owner: str, response: Mapping[str, Any], own_input: Sequence[Item], previous: str | None) -> None:
        """Store a finished response.

        Parameters
        ----------
        owner : of the key that asked for it, see `owner_of`.
        own_input : items of the request, without those of earlier responses.
        previous : id of the response that it continues.
        """
        n_bytes = len(json.dumps([response, own_input]))
        kept = _Kept(owner, response, own_input, previous, n_bytes)
        self._kept[response["id"]] = kept
        self.n_bytes += n_bytes
        for item in kept.items:
            self._items.setdefault(item["id"], {})[response["id"]] = None
        self._forget()

    def get(self, owner: str, name: str) -> Mapping[str, Any]:
        """A response.

        Raises
        ------
        NotKept
        """
        return self._find(owner, name).response

    def delete(self, owner: str, name: str) -> None:
        """Delete a response.

        Raises
        ------
        NotKept
        """
        self._find(owner, name)
        self._drop(name)

    def input_items(self, owner: str, name: str) -> list[Item]:
        """All input items of a response, oldest first.

        Raises
        ------
        NotKept
            When the response, or one that it continues, is gone.
        """
        kept = self._find(owner, name)
        before = [] if kept.previous is None else self.conversation(owner, kept.previous)
        return [*before, *kept.own_input]

    def conversation(self, owner: str, name: str) -> list[Item]:
        """Items of a response and of all that it continues, oldest first.

        Raises
        ------
        PreviousNotKept
            When one of them is gone.
        """
        chain: list[_Kept] = []
        following: str | None = name
        while following is not None and len(chain) < MAX_CHAIN:
            try:
                chain.append(self._find(owner, following))  # the oldest are used last: they outlive what needs them
            except NotKept:
                raise PreviousNotKept("The response", following, "previous_response_id") from None
            following = chain[-1].previous
        if following is not None:
            raise RequestError(
                f"The conversation has more than {MAX_CHAIN} responses; send it as 'input'.",
                "previous_response_id",
            )
        return [item for kept in reversed(chain) for item in kept.items]

    def item(self, owner: str, name: str, where: str) -> Item:
        """One item of any response.

        Raises
        ------
        NotKept
            Names the place in the request.
        """
        self._forget()
        for response in self._items.get(name, {}):
            if self._kept[response].owner == owner:
                return next(item for item in self._find(owner, response).items if item["id"] == name)
        raise NotKept("The item", name, where)

    def _find(self, owner: str, name: str) -> _Kept:
        self._forget()
        kept = self._kept.get(name)
        if kept is None or kept.owner != owner:
            raise NotKept("The response", name)
        kept.used = time.monotonic()
        self._kept.move_to_end(name)
        return kept

    def _forget(self) -> None:
        oldest = time.monotonic() - self._max_age_s
        while self._kept:
            name, kept = next(iter(self._kept.items()))
            if len(self._kept) <= self._max_responses and self.n_bytes <= self._max_bytes and kept.used >= oldest:
                return
            self._drop(name)

    def _drop(self, name: str) -> None:
        kept = self._kept.pop(name)
        self.n_bytes -= kept.n_bytes
        for item in kept.items:
            holders = self._items.get(item["id"], {})
            holders.pop(name, None)
            if not holders:
                self._items.pop(item["id"], None)


def owner_of(headers: Mapping[str, str]) -> str:
    """Whose responses a request may see: those of the key it carries, even if the server has none."""
    key = headers.get("authorization") or headers.get("x-api-key") or ""
    return sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
