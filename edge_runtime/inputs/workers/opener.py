"""Files of messages, opened in a worker: proxies for the pictures, pages and videos in it.

They are `pages.Page` and `video.frame_source.FrameSource`, so nothing outside this file knows where decoding happens.
Sizes from a worker are checked against the limits again: it has read an untrusted file.
"""

from __future__ import annotations

import base64
import contextlib
import math
from array import array
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from edge_runtime.errors import ImageError, MessageError, VideoError
from edge_runtime.inputs.documents import FILE_LIMIT_BYTES, DocumentOptions, check_file_bytes
from edge_runtime.inputs.image import ImageSource, encoded, load_image, name_of
from edge_runtime.inputs.messages import DocumentPart, ImagePart
from edge_runtime.inputs.pages import MAX_TEXT, Page
from edge_runtime.inputs.slicing import Size, check_plan, plan_slices
from edge_runtime.inputs.video.container import MAX_THREADS
from edge_runtime.inputs.video.frame_choice import VideoLimits
from edge_runtime.inputs.video.frame_source import FrameSource, Watch, file_identity
from edge_runtime.inputs.video.picture_frames import FOLDER_RATE, PictureFrames, pictures_in
from edge_runtime.inputs.video.source import UNNAMED, Content, VideoSource
from edge_runtime.inputs.workers.lanes import Check
from edge_runtime.inputs.workers.pool import Decoders, Lease
from edge_runtime.system.base64_data import is_data_uri
from edge_runtime.weights.config import SlicingConfig


def opening(decoders: Decoders | None, check: Check) -> AbstractContextManager[WorkerOpener | None]:
    """An opener with workers; None if there are no workers."""
    return contextlib.nullcontext() if decoders is None else WorkerOpener(decoders, check)


class WorkerOpener:
    """Opens parts of one conversation in one worker, which it leases for the first part; an `opener.Opener`.

    Parameters
    ----------
    check : called while waiting; what it raises ends the work.
    """

    def __init__(self, pool: Decoders, check: Check) -> None:
        self.pool, self._check = pool, check
        self.is_open = True
        self._n_files = 0
        self._stack = contextlib.ExitStack()
        self._taken: Lease | None = None

    def __enter__(self) -> WorkerOpener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_open, self._taken = False, None
        self._stack.close()

    @property
    def lease(self) -> Lease:
        """The worker; the first access waits for one."""
        if self._taken is None:
            self._taken = self._stack.enter_context(self.pool.lease(self._check))
        return self._taken

    def part(self, part: ImagePart, options: DocumentOptions, pixels: int) -> tuple[bool, Sequence[ImageSource]]:
        """As `documents.open_part`."""
        source = part.source
        if isinstance(source, Image.Image | Page):
            if isinstance(part, DocumentPart) and part.must_be_pdf:
                raise MessageError("A part of type 'pdf' holds a picture; expected a path, bytes or a data: URI.")
            return False, [source]
        own: dict[str, Any] | None = None
        if isinstance(part, DocumentPart):
            own = {name: _plain(getattr(part, name)) for name in ("must_be_pdf", "pages", "dpi", "password")}
        how = {field.name: _plain(getattr(options, field.name)) for field in fields(DocumentOptions)}
        data, path = _read(source, options.file_limit_bytes)
        self._n_files += 1
        name = path or ("The document" if own is not None else "The picture")
        if path is None and self._n_files > 1:
            name += f" (file {self._n_files} of the request)"
        request = {"op": "part", "part": own, "options": how, "pixels": pixels, "name": path}
        reply = self.lease.ask(request, name, data=data)
        numbers = reply["pages"] if reply["document"] else [None] * len(reply["items"])
        pages = zip(reply["items"], numbers, strict=True)
        return bool(reply["document"]), [WorkerPage(self.lease, int(item), name, number) for item, number in pages]

    def video(self, source: VideoSource, limits: VideoLimits, watch: Watch, rate: float | None) -> FrameSource:
        """As `video.open.open_video`."""
        if isinstance(source, str | Path) and not is_data_uri(str(source)) and Path(source).is_dir():
            pictures = pictures_in(Path(source))
            return PictureFrames(str(source), pictures, rate or FOLDER_RATE, limits, _Loader(self))
        if isinstance(source, list | tuple):
            return PictureFrames("The video", source, rate or FOLDER_RATE, limits, _Loader(self))
        return WorkerVideo(Content(source, limits), limits, watch, self.lease, self.pool)


class WorkerPage(Page):
    """A picture, or a page of a document, in a worker; gone once that is given back.

    Parameters
    ----------
    number : of the page; None for a picture.
    """

    def __init__(self, lease: Lease, item: int, name: str, number: int | None) -> None:
        self._lease, self._item, self._name = lease, item, name
        self._what = "" if number is None else f"Page {int(number)} of "

    def size(self, pixel_limit: int) -> Size:
        """(width, height), upright."""
        return _size(self._ask("size", pixel_limit), pixel_limit, self._name)

    def render(self, pixel_limit: int) -> Image.Image:
        """The picture."""
        return _picture(self._lease, self._ask("render", pixel_limit), pixel_limit, self._name)

    def text(self) -> str:
        """Its text layer."""
        return str(self._ask("text", 0)["text"])[:MAX_TEXT]

    def cut(
        self, pixel_limit: int, config: SlicingConfig, max_slices: int | None
    ) -> tuple[Size, list[npt.NDArray[np.uint8]]]:
        """Size and slices."""
        reply = self._ask("cut", pixel_limit, slicing=asdict(config), max_slices=max_slices)
        size = _size(reply, pixel_limit, self._name)
        plan = plan_slices(*size, config, max_slices)
        check_plan(*size, plan, config)
        data = np.frombuffer(self._lease.pixels(sum(3 * w * h for w, h in plan.sizes), self._name), np.uint8)
        slices, at = [], 0
        for width, height in plan.sizes:
            slices.append(data[at : at + 3 * width * height].reshape(height, width, 3))
            at += 3 * width * height
        return size, slices

    def _ask(self, op: str, pixel_limit: int, **more: Any) -> dict[str, Any]:
        request = {"op": op, "item": self._item, "pixel_limit": pixel_limit, **more}
        return self._lease.ask(request, self._name, what=self._what)


class WorkerVideo:
    """A video file indexed in a worker; its frames are decoded in another one."""

    sampled = False

    def __init__(self, content: Content, limits: VideoLimits, watch: Watch, lease: Lease, pool: Decoders) -> None:
        self.name, self.content, self.limits, self.pool = content.name, content, limits, pool
        request = {"op": "video", "limits": asdict(limits), "name": self._path}
        reply = lease.ask(
            request, self.name, data=self.read(), n_threads=MAX_THREADS, on_share=watch, error=VideoError
        )
        self.size = _size(reply, limits.most_pixels, self.name)
        self.times: Sequence[float]
        try:
            self.rate, self.missing_s = float(reply["rate"]), float(reply["missing_s"])
            self.times = array("d", base64.b64decode(reply["times"], validate=True))
            self.facts: Mapping[str, Any] = reply["facts"]
            self.digest = bytes.fromhex(reply["digest"])
            self.state: Mapping[str, Any] = reply["state"]
            """What the worker needs to continue; only passed back to it."""
            is_sound = (
                len(self.times) and self.rate > 0 and math.isfinite(self.rate + self.missing_s + sum(self.times))
            )
        except (LookupError, TypeError, ValueError):
            is_sound = False
        if not is_sound:
            raise VideoError(f"{self.name} has a nonsensical index; it is damaged: get the file again.")

    @property
    def _path(self) -> str | None:
        return None if self.name == UNNAMED else self.name

    def read(self) -> bytes:
        """The whole file."""
        with self.content.open() as file:
            return file.read()

    def identity(self, index: int) -> bytes:
        """Fingerprint of the file, with the position in it."""
        return file_identity(self.digest, index)

    def open(self) -> WorkerCursor:
        """Start decoding."""
        return WorkerCursor(self)


class WorkerCursor:
    """Decodes frames in a worker of its own, from the first requested frame until it is closed."""

    def __init__(self, video: WorkerVideo) -> None:
        self._video = video
        self._stack = contextlib.ExitStack()
        self._lease: Lease | None = None
        self._watch: Watch = lambda share: None

    def read(self, index: int, watch: Watch) -> Image.Image:
        """Decode one frame."""
        self._watch, video = watch, self._video
        if self._lease is None:
            lease = self._stack.enter_context(video.pool.lease(lambda: self._watch(0.0), for_frames=True))
            opened: dict[str, Any] = {
                "op": "cursor",
                "limits": asdict(video.limits),
                "state": video.state,
                "name": video._path,
            }
            lease.ask(opened, video.name, data=video.read(), error=VideoError)
            self._lease = lease
        request = {"op": "frame", "index": index}
        what = f"Frame {index} of "
        reply = self._lease.ask(request, video.name, what=what, n_threads=MAX_THREADS, error=VideoError)
        return _picture(self._lease, reply, video.limits.most_pixels, video.name)

    def close(self) -> None:
        """Give the worker back."""
        self._lease = None
        self._stack.close()


class _Loader:
    """Decodes pictures of a list in a worker: the opener's while it is open, another one later."""

    def __init__(self, opener: WorkerOpener) -> None:
        self._opener = opener

    def __call__(self, picture: ImageSource, pixel_limit: int, check: Check) -> Image.Image:
        if isinstance(picture, Image.Image | Page):
            return load_image(picture, pixel_limit=pixel_limit)
        data, path = _read(picture, FILE_LIMIT_BYTES)
        if self._opener.is_open:
            return _decoded(self._opener.lease, data, path, pixel_limit)
        with self._opener.pool.lease(check) as lease:
            return _decoded(lease, data, path, pixel_limit)


def _decoded(lease: Lease, data: bytes, path: str | None, pixel_limit: int) -> Image.Image:
    name = path or "The picture"
    reply = lease.ask({"op": "picture", "pixel_limit": pixel_limit, "name": path}, name, data=data)
    return _picture(lease, reply, pixel_limit, name)


def _picture(lease: Lease, reply: Mapping[str, Any], pixel_limit: int, name: str) -> Image.Image:
    size = _size(reply, pixel_limit, name)
    return Image.frombuffer("RGB", size, lease.pixels(3 * size[0] * size[1], name), "raw", "RGB", 0, 1)


def _size(reply: Mapping[str, Any], pixel_limit: int, name: str) -> Size:
    try:
        width, height = (int(side) for side in reply["size"])
    except (LookupError, TypeError, ValueError, OverflowError):
        width = height = 0
    if width < 1 or height < 1 or width * height > pixel_limit:
        raise ImageError(
            f"{name} has {width} x {height} pixels, at most {pixel_limit} are decoded; scale it down or raise the "
            "limit with --max-pixels."
        )
    return width, height


def _read(source: Any, limit: int) -> tuple[bytes, str | None]:
    """The bytes of a file, and its path if it has one."""
    found = encoded(source)
    if isinstance(found, bytes):
        check_file_bytes(name_of(found, "The file"), len(found), limit)
        return found, getattr(found, "name", None)
    check_file_bytes(str(found), found.stat().st_size, limit)
    try:
        return found.read_bytes(), str(found)
    except OSError as error:
        raise ImageError(f"{found} cannot be read: {error.strerror}; check its permissions.") from None


def _plain(value: Any) -> Any:
    """An option as a JSON type; other types are sent as their repr and refused at the other end."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return [*map(_plain, value)] if isinstance(value, Sequence) and not isinstance(value, bytes) else repr(value)
