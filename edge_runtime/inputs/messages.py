"""Messages in any form that clients send → `Message`.

Accepted content: a string; a list of pictures and strings in order (the official form); OpenAI parts (`text`,
`image_url`, `input_text`, `input_image`) with `data:` URIs or base64; `{"image": ...}` and
`{"type": "image", "image": ...}` as in Hugging Face chats; and Ollama's `images` next to the content: they go where
the text has `[img]` or `[img-N]`, the others first. A part with a picture may have `max_slices`.

`documents` distinguishes documents from pictures; parts that must be a document are read in `attachments`.

Videos: `{"type": "video", "video": ..., **options}` with a path (of a file, or a folder of frames), bytes, a file
object, a `data:` URI or a list of frames; `{"type": "video_url", "video_url": {"url": "data:..."}, **options}`; and
paths with a video's suffix. Options are those of `video.frame_choice.VideoOptions`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from edge_runtime.errors import MessageError
from edge_runtime.inputs.attachments import KINDS, document_fields
from edge_runtime.inputs.image import ImageSource
from edge_runtime.inputs.pages import Page, PageChoice
from edge_runtime.inputs.video.frame_choice import VideoOptions
from edge_runtime.inputs.video.source import VideoSource
from edge_runtime.system.base64_data import decode_base64, is_data_uri, looks_like_base64

THINK, THINK_END = "<think>", "</think>"
VIDEO_SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".avifs", ".flv", ".m2ts", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpeg"),
    *(".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)
ROLES = ("system", "user", "assistant", "tool")
_MARK = re.compile(r"(\[img(?:-[0-9]{1,9})?\])")
_LINE_BEFORE, _LINE_BEHIND = re.compile(r"\r?\n?[ \t]*\Z"), re.compile(r"\A[ \t]*\r?\n?")


@dataclass(frozen=True)
class ImagePart:
    """A picture inside a message, not decoded yet."""

    source: ImageSource
    max_slices: int | None = None
    """Limit for this picture alone; None takes the request's."""


@dataclass(frozen=True)
class DocumentPart(ImagePart):
    """A document inside a message, replaced by a picture for each page (`documents.with_pages`)."""

    must_be_pdf: bool = False
    """Otherwise it may be a picture as well."""
    pages: PageChoice | None = None
    """Chosen pages; None takes the request's choice, as for the following fields."""
    dpi: float | None = None
    password: str | None = None


@dataclass(frozen=True)
class VideoPart:
    """A video inside a message, not opened yet."""

    source: VideoSource
    options: VideoOptions = VideoOptions()  # noqa: RUF009 - frozen


Part = str | ImagePart | VideoPart


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    parts: tuple[Part, ...]
    reasoning: str | None = None
    tool_calls: list[Any] = field(default_factory=list)
    has_thought: bool = False
    """Whether the text itself ended the reasoning with `</think>`, which was removed from it."""


def parse_messages(messages: str | Sequence[Any]) -> list[Message]:
    """Bring a conversation into one form.

    Parameters
    ----------
    messages : a question, or a list of messages (mappings with `role` and `content`).

    Raises
    ------
    MessageError
        Naming the message with the wrong form.
    """
    if isinstance(messages, str):
        return [Message("user", (messages,))]
    if not isinstance(messages, Sequence):
        raise MessageError(
            f"The conversation is of type {type(messages).__name__}; expected a question or a list of messages."
        )
    if not messages:
        raise MessageError("The conversation is empty; expected at least one message with a question.")
    found: list[Message] = []
    n_images = 0
    for number, entry in enumerate(messages):
        found.append(_parse(entry, number, n_images))
        n_images += sum(isinstance(part, ImagePart) for part in found[-1].parts)
    return found


def _parse(entry: Any, number: int, n_images: int) -> Message:
    """Parse one message, after `n_images` pictures."""
    where = f"Message {number}"
    if isinstance(entry, Message):
        return entry
    if not isinstance(entry, Mapping):
        raise MessageError(
            f"{where} is of type {type(entry).__name__}; expected a mapping with 'role' and 'content'."
        )
    role = entry.get("role")
    if role == "developer":  # OpenAI's newer name
        role = "system"
    if role not in ROLES:
        raise MessageError(f"{where} has the role {role!r}; expected one of {', '.join(ROLES)}.")
    images = [_ollama_image(image, where) for image in _list(entry, "images", where)]
    parts = _placed(images, _parse_content(entry.get("content"), where), n_images)
    reasoning = _reasoning(entry, where)
    has_thought = False
    if role == "assistant":
        reasoning, parts, has_thought = _without_reasoning(reasoning, parts, where)
    elif role == "system" and any(isinstance(part, ImagePart | VideoPart) for part in parts):
        raise MessageError(f"{where} puts a picture into the system prompt; pictures belong to user messages.")
    return Message(role, tuple(parts), reasoning, _list(entry, "tool_calls", where), has_thought)


def _reasoning(entry: Mapping[str, Any], where: str) -> str | None:
    """Reasoning under any of its names."""
    found = None
    for name in ("reasoning_content", "reasoning", "thinking"):
        value = entry.get(name)
        if value is not None and not isinstance(value, str):
            raise MessageError(f"{where} has {name!r} of type {type(value).__name__}; expected a string.")
        found = found or value
    return found


def _placed(images: Sequence[ImagePart], parts: Sequence[Part], n_before: int) -> list[Part]:
    """Put Ollama's `images` among the parts: each at its mark, the others first.

    `[img-N]` is picture N of the conversation, counted from 0, as Ollama writes it; or, if a message has no picture
    with such a number, of the message. Then each remaining picture takes the next `[img]`. A mark without a picture
    is text.

    Parameters
    ----------
    n_before : number of pictures in earlier messages.
    """
    if not images:
        return [*parts]
    split = [_MARK.split(part) if isinstance(part, str) else [part] for part in parts]
    marks = [(i, j, str(split[i][j])) for i in range(len(split)) for j in range(1, len(split[i]), 2)]
    numbers = {int(mark[5:-1]) for _, _, mark in marks if mark != "[img]"}
    first = n_before if numbers & {*range(n_before, n_before + len(images))} else 0
    left = dict(enumerate(images, first))
    places = {(i, j): left.pop(int(mark[5:-1]), None) for i, j, mark in marks if mark != "[img]"}
    free = [(i, j) for i, j, mark in marks if mark == "[img]"]
    places |= {place: left.pop(number) for place, number in zip(free, [*left], strict=False)}
    found: list[Part] = [*left.values()]
    for i, pieces in enumerate(split):
        found += _with_pictures(pieces, [places.get((i, j)) for j in range(len(pieces))])
    return found


def _with_pictures(pieces: Sequence[Part], pictures: Sequence[ImagePart | None]) -> list[Part]:
    """Pieces of one part, some of which are pictures, on lines of their own, as between parts."""
    parts: list[Part] = [""]
    for piece, picture in zip(pieces, pictures, strict=True):
        if picture is not None:
            parts += [picture, ""]
        elif isinstance(piece, str):
            parts[-1] = f"{parts[-1]}{piece}"
        else:
            parts[-1] = piece
    last = len(parts) - 1
    for i in range(0, last + 1, 2):
        if isinstance(text := parts[i], str) and last:
            text = _LINE_BEFORE.sub("", text) if i < last else text
            parts[i] = _LINE_BEHIND.sub("", text) if i else text
    return [part for part in parts if part != "" or not last]


def _list(entry: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = entry.get(key) or []
    if not isinstance(value, list | tuple):
        raise MessageError(f"{where} has {key!r} of type {type(value).__name__}; expected a list.")
    return list(value)


def _without_reasoning(reasoning: Any, parts: list[Part], where: str) -> tuple[str | None, list[Part], bool]:
    """Remove the reasoning from an earlier answer, as the template does, so that the rest can be guarded as text.

    Pictures after it stay where they are.

    Returns
    -------
    reasoning, parts, has_thought : the last says whether the text held the end of reasoning.
    """
    n_before = max((i for i, part in enumerate(parts) if isinstance(part, str) and THINK_END in part), default=-1) + 1
    if not n_before:
        return reasoning, parts, False
    if not all(isinstance(part, str) for part in parts[:n_before]):
        raise MessageError(
            f"{where} has a picture in its reasoning, which prompts leave out; put it after {THINK_END}."
        )
    written, answer = split_reasoning("\n".join(str(part) for part in parts[:n_before]))
    left = [*([answer] if answer or n_before == len(parts) else []), *parts[n_before:]]
    return (str(reasoning) if reasoning else written), left, True


def split_reasoning(text: str) -> tuple[str | None, str]:
    """Split an earlier answer into (reasoning, answer) like the official template; reasoning is None without any."""
    if THINK_END not in text:
        return None, text
    before, answer = text.split(THINK_END)[0], text.split(THINK_END)[-1]
    return before.rstrip("\n").split(THINK)[-1].lstrip("\n"), answer.lstrip("\n")


def _parse_content(content: Any, where: str) -> list[Part]:
    if content is None:
        return []
    if isinstance(content, str | Image.Image | Path | bytes | Mapping | Page) or hasattr(content, "read"):
        content = [content]
    if not isinstance(content, Sequence):
        raise MessageError(
            f"{where} has content of type {type(content).__name__}; expected a string or a list of pictures and "
            "strings."
        )
    return [_parse_part(part, where) for part in content]


def _parse_part(part: Any, where: str) -> Part:
    if isinstance(part, Part):
        return part
    if isinstance(part, Path) and part.suffix.lower() in VIDEO_SUFFIXES:
        return VideoPart(part)
    if _is_picture(part):
        return ImagePart(part)
    if isinstance(part, Mapping):
        kind = part.get("type")
        if kind in ("video", "video_url") or (kind is None and "video" in part):
            return _parse_video(part, where)
        if kind in ("text", "input_text") or (kind is None and "text" in part):
            text = part.get("text")
            if not isinstance(text, str):
                raise MessageError(f"{where} has a text of type {type(text).__name__}; expected a string.")
            return text
        if kind in ("image_url", "input_image"):
            url = part.get("image_url")
            source = _checked_url(url.get("url") if isinstance(url, Mapping) else url, where)
            return ImagePart(source, _max_slices(part))
        if kind in KINDS:
            return DocumentPart(**document_fields(part, where), max_slices=_max_slices(part))
        if kind in (None, "image") and part.get("image") is not None:
            source = part["image"]
            if not isinstance(source, str) and not _is_picture(source):
                raise MessageError(
                    f"{where} has an image of type {type(source).__name__}; expected a path, bytes, an open file or "
                    "a Pillow picture."
                )
            if part.get("pages") is not None:  # of a TIFF, or a PDF that came as an image
                return DocumentPart(source, _max_slices(part), pages=part["pages"])
            return ImagePart(source, _max_slices(part))
        raise MessageError(
            f"{where} has a part of type {kind!r}; expected 'text', 'image', 'image_url', 'pdf', 'file', 'video' or "
            "'video_url'."
        )
    raise MessageError(f"{where} has a part of type {type(part).__name__}; expected a string or a picture.")


def _is_picture(value: Any) -> bool:
    """Whether a value is always a picture: any `ImageSource` except strings, which may be text."""
    return isinstance(value, Image.Image | Path | bytes | Page) or hasattr(value, "read")


def _max_slices(part: Mapping[str, Any]) -> int | None:
    """The limit of cells for one picture; `max_slice_nums` is its official name."""
    return checked_max_slices(part.get("max_slices", part.get("max_slice_nums")))


def _parse_video(part: Mapping[str, Any], where: str) -> VideoPart:
    source = part.get("video")
    if part.get("type") == "video_url":
        url = part.get("video_url")
        source = _checked_url(url.get("url") if isinstance(url, Mapping) else url, where, "video", "video/mp4")
    if source is None:
        raise MessageError(f"{where} has a video without content; expected it under 'video', or 'video_url'.")
    options = {name: value for name, value in part.items() if name not in ("type", "video", "video_url")}
    if "max_slice_nums" in options:
        options["max_slices"] = options.pop("max_slice_nums")
    return VideoPart(source, VideoOptions.of(options))


def checked_max_slices(value: Any) -> int | None:
    """Return a valid limit of cells per picture, or None.

    Raises
    ------
    MessageError
        When it is not a positive whole number.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise MessageError(f"max_slices is {value!r}; expected 1 (never cut) or a larger whole number.")
    return value


def _checked_url(url: Any, where: str, what: str = "image", kind: str = "image/png") -> str | bytes:
    """A data URI, or bytes of base64: an address or path in a message must never make us read or fetch anything."""
    if is_data_uri(url):
        return url
    if looks_like_base64(url):
        with suppress(ValueError):
            return decode_base64(url)
    raise MessageError(
        f"{where} has the {what} address {str(url)[:40]!r}; expected a data: URI (data:{kind};base64,...), "
        "nothing is fetched."
    )


def _ollama_image(image: Any, where: str) -> ImagePart:
    """Ollama sends plain base64; some clients leave the data: prefix on."""
    if isinstance(image, Image.Image | Path | bytes):
        return ImagePart(image)
    if isinstance(image, str):
        if is_data_uri(image):
            return ImagePart(image)
        if looks_like_base64(image):
            with suppress(ValueError):
                return ImagePart(decode_base64(image))
    raise MessageError(
        f"{where} has an entry in 'images' that is not base64; expected the encoded bytes of a picture."
    )
