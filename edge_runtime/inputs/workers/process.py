"""The process in which untrusted files are decoded; `pool` starts it, and ends it when it must.

Each line on stdin is a request, `{"op": ...}`, each line on stdout a reply, `{...}`, `{"error": class, "text": ...}`,
or, before it, `{"share": ...}` of a video's index. Bytes of files, and pixels, go through a `SharedBuffer`; pixels
that do not fit into the buffer are fetched in a second step, since only then its required size is known.

Output of this process is trusted no more than a client's: replies are JSON.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.inputs.documents import DocumentOptions, open_part
from edge_runtime.inputs.image import ImageSource, NamedBytes, load_image, picture_size
from edge_runtime.inputs.libtiff_notes import silence_libtiff
from edge_runtime.inputs.messages import DocumentPart, ImagePart
from edge_runtime.inputs.opener import cut_source
from edge_runtime.inputs.pages import Page
from edge_runtime.inputs.pdf import PdfPage
from edge_runtime.inputs.tiff import TiffPage
from edge_runtime.inputs.video.frame_choice import VideoLimits
from edge_runtime.inputs.video.frame_source import FrameCursor
from edge_runtime.inputs.video.open import open_cursor, open_file
from edge_runtime.inputs.video.source import Content
from edge_runtime.system import sandbox
from edge_runtime.system.shared_memory import Mapped
from edge_runtime.weights.config import SlicingConfig

REPORT_EVERY_S = 0.05
"""How often the finished share of a video's index is reported."""


class Session:
    """What one request has opened."""

    def __init__(self) -> None:
        self._sources: list[ImageSource] = []
        """Pictures and pages, by the numbers under which they are requested."""
        self._cursor: FrameCursor | None = None
        self._pixels: Sequence[np.ndarray] = ()

    def part(self, data: NamedBytes | None, request: Mapping[str, Any]) -> dict[str, Any]:
        """Open a picture or a document; returns the numbers of its picture or pages."""
        assert data is not None
        own = request["part"]
        part: ImagePart = DocumentPart(data, **own) if own is not None else ImagePart(data)
        is_document, sources = open_part(part, DocumentOptions(**request["options"]), request["pixels"])
        first = len(self._sources)
        self._sources += sources
        return {
            "document": is_document,
            "items": [*range(first, len(self._sources))],
            "pages": [source.index + 1 for source in sources if isinstance(source, PdfPage | TiffPage)],
        }

    def picture(self, data: NamedBytes | None, request: Mapping[str, Any]) -> dict[str, Any]:
        """Decode a picture that is used only once."""
        assert data is not None
        return self._show(load_image(data, pixel_limit=request["pixel_limit"]))

    def size(self, data: object, request: Mapping[str, Any]) -> dict[str, Any]:
        """(width, height) of a picture or page."""
        return {"size": picture_size(self._source(request), pixel_limit=request["pixel_limit"])}

    def render(self, data: object, request: Mapping[str, Any]) -> dict[str, Any]:
        """Decode a picture, or draw a page."""
        return self._show(load_image(self._source(request), pixel_limit=request["pixel_limit"]))

    def text(self, data: object, request: Mapping[str, Any]) -> dict[str, Any]:
        """What a page says of its own text."""
        source = self._source(request)
        return {"text": source.text() if isinstance(source, Page) else ""}

    def cut(self, data: object, request: Mapping[str, Any]) -> dict[str, Any]:
        """Decode a picture or draw a page, and cut it into slices."""
        slicing = SlicingConfig(**request["slicing"])
        size, slices = cut_source(self._source(request), request["pixel_limit"], slicing, request["max_slices"])
        self._pixels = slices
        return {"size": size}

    def video(self, data: NamedBytes | None, request: Mapping[str, Any]) -> dict[str, Any]:
        """Make the index of a video."""
        assert data is not None
        limits = VideoLimits(**request["limits"])
        source = open_file(Content(data, limits), limits, _reporter())
        return {
            "size": source.size,
            "rate": source.rate,
            "times": base64.b64encode(array("d", source.times).tobytes()).decode(),
            "missing_s": source.missing_s,
            "facts": dict(source.facts),
            "digest": source.digest.hex(),
            "state": source.state(),
        }

    def cursor(self, data: NamedBytes | None, request: Mapping[str, Any]) -> dict[str, Any]:
        """Start decoding frames of a video whose index is known."""
        assert data is not None
        limits = VideoLimits(**request["limits"])
        self._cursor = open_cursor(Content(data, limits), limits, request["state"])
        return {}

    def frame(self, data: object, request: Mapping[str, Any]) -> dict[str, Any]:
        """Decode a frame."""
        assert self._cursor is not None
        return self._show(self._cursor.read(request["index"], lambda share: None))

    def fetch(self, data: object, request: Mapping[str, Any]) -> dict[str, Any]:
        """Put the last pixels into the buffer."""
        pixels, self._pixels = self._pixels, ()
        memory, at = _BUFFER.memory(request["buffer"], request["room"]), 0
        for item in pixels:
            place = np.frombuffer(memory, np.uint8, item.nbytes, at).reshape(item.shape)
            place[:] = item
            del place  # a mapping with views cannot be closed
            at += item.nbytes
        return {}

    @property
    def n_pixel_bytes(self) -> int:
        """Bytes of the last pixels that were not fetched."""
        return sum(item.nbytes for item in self._pixels)

    def close(self) -> None:
        """Forget everything."""
        if self._cursor is not None:
            self._cursor.close()

    def _source(self, request: Mapping[str, Any]) -> ImageSource:
        item: int = request["item"]
        return self._sources[item]

    def _show(self, picture: Image.Image) -> dict[str, Any]:
        self._pixels = (np.asarray(picture),)
        return {"size": picture.size}


OPERATIONS: Mapping[str, Callable[[Session, NamedBytes | None, Mapping[str, Any]], dict[str, Any]]] = {
    "part": Session.part,
    "picture": Session.picture,
    "size": Session.size,
    "render": Session.render,
    "text": Session.text,
    "cut": Session.cut,
    "video": Session.video,
    "cursor": Session.cursor,
    "frame": Session.frame,
    "fetch": Session.fetch,
}


def _reporter() -> Callable[[float], None]:
    """A callback that reports the share of a video's index, not too often."""
    last = time.monotonic()

    def report(share: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > REPORT_EVERY_S:
            last = now
            _reply({"share": share})

    return report


def _reply(reply: Mapping[str, Any]) -> None:
    _OUT.write(json.dumps(reply).encode() + b"\n")
    _OUT.flush()


def _answer(session: Session, request: Mapping[str, Any]) -> dict[str, Any]:
    """Execute a request; errors of this package are returned so that the other end can raise them again."""
    data = None
    if "bytes" in request:
        memory = _BUFFER.memory(request["buffer"], request["room"])
        data = NamedBytes(memory[: request["bytes"]])
        data.name = request["name"]
    try:
        reply = OPERATIONS[request["op"]](session, data, request)
        if 0 < session.n_pixel_bytes <= request["room"]:
            session.fetch(None, request)
        return reply
    except EdgeRuntimeError as error:
        return {"error": type(error).__name__, "text": str(error)}
    except MemoryError:
        return {"error": "MemoryError", "text": ""}
    except Exception as error:  # noqa: BLE001 - reported at the other end, where the file's name is known
        return {"error": "Exception", "text": f"{type(error).__name__}: {error}"[:500]}


def main(max_bytes: int) -> None:
    """Answer requests until stdin ends.

    Parameters
    ----------
    max_bytes : limit of its memory.
    """
    Image.init()
    silence_libtiff()  # finds the library in /proc, which is not accessible from here on
    sandbox.be_killed_first()
    held = {
        "memory": sandbox.limit_resources(max_bytes),
        "files": sandbox.give_up_files(),
        "network": sandbox.give_up_system_calls(),
    }
    _reply(held)
    session = Session()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        sandbox.limit_time(request["processor_s"])
        if request["op"] == "clear":
            session.close()
            session = Session()
        else:
            with sandbox.ended_with(0):
                reply = _answer(session, request)
            _reply({**reply, "number": request["number"]})


_BUFFER = Mapped()
# Replies have a descriptor of their own: a library's output must not get between them.
_OUT = os.fdopen(os.dup(1), "wb") if __name__ == "__main__" else sys.stdout.buffer

if __name__ == "__main__":
    os.dup2(2, 1)
    main(int(sys.argv[1]))
