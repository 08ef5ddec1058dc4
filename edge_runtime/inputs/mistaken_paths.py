"""Texts in a list that were meant as files: `["photo.jpg", "What is it?"]`.

A string in a message is text, never a path: strings come from clients. Whoever calls `Model.chat` with a file's name
as a string would get an answer that has not seen the file, so it is an error there. Servers and the command line,
whose strings are what somebody wrote, do not come through here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from edge_runtime.errors import MessageError
from edge_runtime.inputs.messages import VIDEO_SUFFIXES

FILE_SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".svg", ".tga", ".tif", ".tiff", ".webp"),
    *(".pdf", *VIDEO_SUFFIXES),
)
"""Suffixes of pictures, documents and videos that can be read."""
_MAX_CHARACTERS = 4096


def refuse_mistaken_paths(messages: str | Sequence[Any]) -> None:
    """Refuse plain strings that name a picture, document or video where a list holds pictures and strings.

    Raises
    ------
    MessageError
        Naming the message, the string, and what to write instead.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        return
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list | tuple):
            continue
        for text in content:
            if isinstance(text, str) and (found := _named(text.strip())) is not None:
                name = text.strip()
                raise MessageError(
                    f"Message {number} has the string {name[:120]!r}, {found}, but strings are text and no file is "
                    f"opened: write Path({name[:120]!r}), or {{'type': 'text', 'text': ...}} if it is the text."
                )


def _named(text: str) -> str | None:
    """What a text can only be, if it is a file's name; None if it is a text."""
    if not text or len(text) > _MAX_CHARACTERS or any(c in text for c in "\n\0"):
        return None
    if os.path.splitext(text)[1].lower() not in FILE_SUFFIXES:  # noqa: PTH122 - of any text
        return None
    if os.path.isfile(os.path.expanduser(text)):  # noqa: PTH111, PTH113
        return "which names a file"
    return None if any(c.isspace() for c in text) else "which looks like the name of a file (there is none)"
