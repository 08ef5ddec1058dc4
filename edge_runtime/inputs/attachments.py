"""Parts of a message that hold a document → the fields of a `messages.DocumentPart`.

Accepted are `{"type": "pdf", "pdf": ...}` with a path, bytes, an open file or a `data:` URI, optionally with `pages`,
`dpi`, `password` and `max_slices`; OpenAI's `{"type": "file", "file": {"file_data": "data:..."}}` (chats), and its
`{"type": "input_file", "file_data": "data:..."}` (responses).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from edge_runtime.errors import MessageError
from edge_runtime.system.base64_data import decode_base64, is_data_uri, looks_like_base64

KINDS = ("pdf", "file", "input_file")
"""Types of parts that are read here."""


def document_fields(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of a `DocumentPart`, except its limit of cells.

    Raises
    ------
    MessageError
        Naming what is missing or of the wrong type.
    """
    kind = part["type"]
    if kind == "pdf":
        source = part.get("pdf")
        if not (isinstance(source, str | Path | bytes) or hasattr(source, "read")) or isinstance(source, Image.Image):
            raise MessageError(
                f"{where} has a 'pdf' of type {type(source).__name__}; expected a path, bytes, an open file or a "
                "data: URI."
            )
    else:
        source = _file_data(part.get("file") if kind == "file" else part, where)
    password = part.get("password")
    if password is not None and not isinstance(password, str):
        raise MessageError(f"{where} has a password of type {type(password).__name__}; expected a string.")
    return {
        "source": source,
        "must_be_pdf": kind == "pdf",
        "pages": part.get("pages"),
        "dpi": part.get("dpi"),
        "password": password,
    }


def _file_data(holder: Any, where: str) -> str | bytes:
    """OpenAI's file: a `data:` URI, or plain base64. A name or an address must never make us read or fetch it."""
    data = holder.get("file_data") if isinstance(holder, Mapping) else None
    if is_data_uri(data):
        return data
    if looks_like_base64(data):
        with suppress(ValueError):
            return decode_base64(data)
    raise MessageError(
        f"{where} has a file whose file_data is {str(data)[:40]!r}; expected a data: URI "
        "(data:application/pdf;base64,...); file ids are not supported and nothing is fetched."
    )
