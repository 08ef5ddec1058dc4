"""Content of messages as clients of OpenAI's APIs write it → parts as `edge_runtime.inputs.messages` takes them.

Enters: the `content` of a message of chat completions or responses. Leaves: a string, or a list of
parts of four kinds: text, image_url, video_url, file. A client's string never becomes a path: anything but a data:
URI or an http address is refused here; whether an address is fetched is decided elsewhere. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edge_runtime.server.errors import RequestError
from edge_runtime.system.base64_data import as_data_uri, is_data_uri, looks_like_base64

HTTP = ("http://", "https://")
TEXTS = ("text", "input_text", "output_text")
VIDEO_OPTIONS = ("fps", "max_frames", "packing", "start", "end", "timestamps", "max_slices")
DOCUMENT_OPTIONS = ("pages", "dpi", "password", "max_slices")
Part = dict[str, Any]


def content_parts(content: Any, where: str) -> str | list[Part]:
    """Translate the content of a message.

    Parameters
    ----------
    content : a string, a list of parts, or None.
    where : its place in the request, for errors.

    Raises
    ------
    RequestError
        Names the part that is malformed, or that no model here can read.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(
            f"The content is of type {type(content).__name__}; expected a string or a list of parts.", where
        )
    return [_part(part, f"{where}[{number}]") for number, part in enumerate(content)]


def _part(part: Any, where: str) -> Part:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise RequestError(
            f"The part is of type {type(part).__name__}; expected an object with a 'type', such as "
            '{"type": "text", "text": "..."}.',
            where,
        )
    kind = part.get("type")
    translate = _KINDS.get(kind) if isinstance(kind, str) else None
    if translate is None:
        raise RequestError(
            f"The part has the type {str(kind)[:40]!r}; expected one of {', '.join(_KINDS)}.", f"{where}.type"
        )
    return translate(part, where)


def _text(part: Mapping[str, Any], where: str) -> Part:
    key = "refusal" if part["type"] == "refusal" else "text"
    text = part.get(key)
    if not isinstance(text, str):
        raise RequestError(
            f"The text of the part is of type {type(text).__name__}; expected a string.", f"{where}.{key}"
        )
    return {"type": "text", "text": text}


def _image(part: Mapping[str, Any], where: str) -> Part:
    """`image_url` is an object in chat completions and a string in responses; clients mix them up."""
    found = part.get("image_url")
    _refuse_stored(part, where)
    detail = part.get("detail")
    if isinstance(found, Mapping):
        url, detail = found.get("url"), found.get("detail", detail)
    else:
        url = found
    image = {"url": checked_address(url, f"{where}.image_url")}
    # OpenAI's word for a cheap look at the whole picture: the overview alone.
    limit = {"max_slices": 1} if detail == "low" else {}
    return {"type": "image_url", "image_url": image, **limit, **_options(part, ("max_slices",))}


def _video(part: Mapping[str, Any], where: str) -> Part:
    found = part.get("video_url")
    url = found.get("url") if isinstance(found, Mapping) else found
    address = checked_address(url, f"{where}.video_url")
    return {"type": "video_url", "video_url": {"url": address}, **_options(part, VIDEO_OPTIONS)}


def _file(part: Mapping[str, Any], where: str) -> Part:
    """A document: nested under `file` in chat completions, flat in responses."""
    found = part.get("file", part)
    if not isinstance(found, Mapping):
        raise RequestError(
            f"The file is of type {type(found).__name__}; expected an object with 'file_data'.", f"{where}.file"
        )
    _refuse_stored(found, where)
    data = found.get("file_data") or found.get("file_url")
    file: Part = {"file_data": checked_address(data, f"{where}.file_data", "application/pdf")}
    if isinstance(found.get("filename"), str):
        file["filename"] = found["filename"]
    return {"type": "file", "file": file, **_options(part, DOCUMENT_OPTIONS)}


def _options(part: Mapping[str, Any], names: tuple[str, ...]) -> Part:
    """Options of a part besides its data, for the runtime to check."""
    return {name: part[name] for name in names if part.get(name) is not None}


def _refuse_stored(part: Mapping[str, Any], where: str) -> None:
    if part.get("file_id"):
        raise RequestError(
            "The part names an uploaded file, but this server stores none; send its bytes as a data: URI.",
            f"{where}.file_id",
        )


def checked_address(url: Any, where: str, kind: str = "application/octet-stream") -> str:
    """Return the address of a picture, video or document if it is a data: URI or an http address.

    Base64 alone becomes a data: URI of a media type.

    Raises
    ------
    RequestError
        Otherwise; paths and other schemes are never opened.
    """
    if is_data_uri(url) or (isinstance(url, str) and url.startswith(HTTP)):
        return url
    if looks_like_base64(url):
        return as_data_uri(url, kind)
    found = f"{url[:40]!r}" if isinstance(url, str) else f"of type {type(url).__name__}"
    raise RequestError(
        f"The address is {found}; expected a data: URI, such as data:image/png;base64,... with the file's bytes.",
        where,
    )


_KINDS: dict[str, Callable[[Mapping[str, Any], str], Part]] = {
    **dict.fromkeys((*TEXTS, "refusal"), _text),
    **dict.fromkeys(("image_url", "input_image"), _image),
    **dict.fromkeys(("video_url", "input_video"), _video),
    **dict.fromkeys(("file", "input_file"), _file),
}
