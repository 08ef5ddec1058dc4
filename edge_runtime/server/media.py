"""What clients put into messages besides text → `data:` URIs only, and no more of them than allowed.

A path in a message must never make this machine read a file, and an address must never make it fetch something the
owner has not allowed. So in a part that is not text, every string either describes (a name, a kind) or is data: a
`data:` URI stays, base64 becomes one, since `////////dev/zero` is base64 as well, an address is fetched by `fetch`
or refused, and anything else is refused. The same rule applies to parts of unknown kinds; the runtime's own
parser decides whether it knows them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.errors import ImageError
from edge_runtime.prompt.long_text import LONG_TEXT
from edge_runtime.server.errors import NotAllowed, RequestError, TooLarge
from edge_runtime.server.fetch import Fetcher
from edge_runtime.server.settings import Settings
from edge_runtime.system.base64_data import as_data_uri, data_uri_size, is_data_uri, looks_like_base64

DESCRIPTIONS = frozenset(
    {"type", "detail", "format", "filename", "name", "media_type", "mime_type", "id", "text", "quality"}
    | {"pages", "password"}  # of a document
)
"""Keys of a part whose strings only describe."""
TEXT_KINDS = ("text", "input_text", "output_text", "refusal")
TEXT_KEYS = frozenset({"", "content", "text", "refusal", "reasoning", "reasoning_content", "thinking", "arguments"})
"""Their strings are read as text, whatever they start with."""
VIDEO_KINDS = ("video", "video_url", "input_video")
LARGE_KINDS = (*VIDEO_KINDS, "file", "input_file", "document")
"""Parts that may be as large as a video."""
HTTP = ("http://", "https://")


async def brought_in(messages: Any, settings: Settings, fetcher: Fetcher) -> Any:
    """Return a self-contained conversation: addresses are fetched if the owner allows that.

    Raises
    ------
    RequestError, TooLarge
        As for `checked_messages`.
    NotAllowed, ImageError
        When an address may not be fetched, or cannot be.
    """
    addresses: dict[str, int] = {}
    Media(settings, to_be_fetched=addresses).conversation(messages)
    fetched: dict[str, str] = {}
    left = settings.max_body_bytes  # fetched bytes take memory as sent ones do
    for address, most in addresses.items():
        try:
            data = await fetcher.fetch(address, min(most, left))
        except ImageError:
            if left < most:
                raise TooLarge(
                    f"The pictures to fetch have more than {settings.max_body_bytes} bytes together, which is "
                    "the limit; send fewer."
                ) from None
            raise
        left -= len(data)
        fetched[address] = as_data_uri(base64.b64encode(data).decode())
    return checked_messages(messages, settings, fetched)


def checked_messages(messages: Any, settings: Settings, fetched: Mapping[str, str] | None = None) -> Any:
    """Return a conversation in which nothing refers to anything outside the request.

    Parameters
    ----------
    fetched : address → `data:` URI of what was fetched from it.

    Raises
    ------
    RequestError
        When a part holds a path, or anything else that is not data.
    NotAllowed
        When it holds an address that was not fetched.
    TooLarge
        When there are too many pictures, or one is too large.
    """
    return Media(settings, fetched or {}).conversation(messages)


def has_media(messages: Any) -> bool:
    """Whether a conversation may hold more than text."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return False
    found = [message for message in messages if isinstance(message, Mapping)]
    if any(message.get("images") for message in found):
        return True
    contents = [message.get("content") for message in found]
    parts = [content if isinstance(content, list | tuple) else [content] for content in contents]
    return not all(_is_text(part) for some in parts for part in some)


def _is_text(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return part is None or isinstance(part, str)
    return part.get("type", "text") in TEXT_KINDS and not part.keys() & {"image", "video"}


def has_long_text(messages: Any) -> bool:
    """Whether a conversation has so much text that tokenising it takes long; `data:` URIs count, too."""
    left, n_characters = [messages], 0
    while left and n_characters <= LONG_TEXT:
        item = left.pop()
        if isinstance(item, str):
            n_characters += len(item)
        elif isinstance(item, Mapping):
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item
    return n_characters > LONG_TEXT


def text_bytes(value: Any, key: str = "") -> int:
    """UTF-8 bytes of all texts in a self-contained conversation, without `data:` URIs of media."""
    left, n_bytes = [(key, value)], 0
    while left:
        key, item = left.pop()
        if isinstance(item, str):
            is_media = key not in TEXT_KEYS and is_data_uri(item)
            if not is_media:
                n_bytes += len(item) if item.isascii() else len(item.encode("utf-8", "surrogatepass"))
        elif isinstance(item, Mapping):
            left += [("text", name) for name in item]
            left += [(str(name), inner) for name, inner in item.items()]
        elif isinstance(item, list | tuple):
            left += [(key, inner) for inner in item]
    return n_bytes


@dataclass
class Media:
    """One pass over a conversation."""

    settings: Settings
    fetched: Mapping[str, str] = field(default_factory=dict)
    to_be_fetched: dict[str, int] | None = None
    """If not None, addresses are collected here, with the largest size allowed for each, instead of replaced."""
    n_media: int = 0

    def conversation(self, messages: Any) -> Any:
        """The same conversation, with nothing but data."""
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            return messages
        return [self._message(message) if isinstance(message, Mapping) else message for message in messages]

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(message)
        images, content = message.get("images"), message.get("content")
        if isinstance(images, list | tuple):
            found["images"] = [self._data(image, "images", self.settings.max_image_bytes) for image in images]
        if isinstance(content, Mapping):
            found["content"] = self._part(content)
        elif isinstance(content, list | tuple):
            found["content"] = [self._part(part) if isinstance(part, Mapping) else part for part in content]
        return found

    def _part(self, part: Mapping[str, Any]) -> dict[str, Any]:
        kind = part.get("type") or ("video" if "video" in part else "text")
        if kind in TEXT_KINDS:
            texts = {key: value for key, value in part.items() if key in ("text", "refusal")}
            others = {key: value for key, value in part.items() if key not in texts}
            return {**self._walk(others, "", self.settings.max_image_bytes), **texts}
        most = self.settings.max_video_bytes if kind in LARGE_KINDS else self.settings.max_image_bytes
        found: dict[str, Any] = self._walk(part, "", most)
        if kind in VIDEO_KINDS:
            frames, limit = found.get("max_frames"), self.settings.max_video_frames
            found["max_frames"] = limit if frames is None else min(frames, limit) if type(frames) is int else frames
        return found

    def _walk(self, value: Any, key: str, most: int) -> Any:
        if isinstance(value, Mapping):
            return {name: self._walk(item, str(name), most) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._walk(item, key, most) for item in value]
        if isinstance(value, str) and key not in DESCRIPTIONS:
            return self._data(value, key, most)
        return value

    def _data(self, value: Any, where: str, most: int) -> str:
        """One picture, video or document."""
        self.n_media += 1
        if self.n_media > self.settings.max_images:
            raise TooLarge(
                f"The request holds more than {self.settings.max_images} pictures, which is the limit; send fewer."
            )
        text = value if isinstance(value, str) else ""
        if text.startswith(HTTP):
            return self._address(text, most)
        if not is_data_uri(text):
            if not looks_like_base64(text):
                raise _no_data(value, where)
            text = as_data_uri(text)
        n_bytes = data_uri_size(text)
        if n_bytes > most:
            raise TooLarge(
                f"A picture, video or document has {n_bytes} bytes, at most {most} are accepted; send a smaller one."
            )
        return text

    def _address(self, address: str, most: int) -> str:
        if self.to_be_fetched is not None:
            self.to_be_fetched[address] = most
            return address
        if address not in self.fetched:
            raise NotAllowed(f"{address[:80]!r} is an address, which is not fetched for this request; send the data.")
        return self.fetched[address]


def _no_data(value: Any, where: str) -> RequestError:
    shown = value[:40] if isinstance(value, str) else type(value).__name__
    return RequestError(
        f"{where!r} of a message is {shown!r}; expected a data: URI (data:image/png;base64,...) or base64: this "
        "server opens no files for a request.",
        where,
    )
