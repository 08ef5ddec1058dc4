"""A video from any source → content that can be opened as a file, more than once and after the call.

Nothing is fetched, and no address reaches a library that would fetch it: videos are read through Python's files.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any, BinaryIO

from edge_runtime.errors import VideoError
from edge_runtime.inputs.video.frame_choice import VideoLimits
from edge_runtime.system.base64_data import data_uri_size, decode_data_uri, is_data_uri
from edge_runtime.system.forks import only_here

VideoSource = str | Path | bytes | BinaryIO | list[Any] | tuple[Any, ...]
"""A path (of a file, or a folder of frames), encoded bytes, a file object, a `data:` URI, or a list of pictures."""

IN_MEMORY = 32 << 20
"""Bytes of a file object that are kept in memory; longer ones are copied to a temporary file."""
COPY_BYTES = 1 << 20
UNNAMED = "The video"
"""What errors call a video that is not a file."""


class Content:
    """A file on disk, or bytes in memory.

    Raises
    ------
    VideoError
        When there is no file, or it is empty or larger than allowed.
    """

    def __init__(self, source: str | Path | bytes | BinaryIO, limits: VideoLimits) -> None:
        self._path: Path | None = None
        self._bytes = b""
        self.name = UNNAMED
        if is_data_uri(source):
            self._bytes = _decode_data_uri(source, limits)
        elif isinstance(source, bytes | bytearray | memoryview):
            self._bytes = source if isinstance(source, bytes) else bytes(source)
            self.name = getattr(source, "name", None) or self.name
        elif isinstance(source, str | Path):
            self._path = Path(source)
            self.name = str(source)
        elif callable(getattr(source, "read", None)):
            self._take(source, limits)
        else:
            raise VideoError(
                f"The video is of type {type(source).__name__}; expected a path, bytes, a data: URI, a file object "
                "or a list of pictures."
            )
        self._stamp = self._look()
        if self.n_bytes == 0:
            raise VideoError(f"{self.name} is empty (0 bytes), expected a video; get it again.")
        check_bytes(self.name, self.n_bytes, limits)

    @property
    def n_bytes(self) -> int:
        """Size in bytes."""
        return self._stamp[0] if self._path is not None else len(self._bytes)

    def open(self) -> BinaryIO:
        """Open it at its start.

        Raises
        ------
        VideoError
            When it cannot be read, or has changed since it was first opened.
        """
        if self._path is None:
            return io.BytesIO(self._bytes)
        if self._look() != self._stamp:
            raise VideoError(f"{self.name} changed while it was read; ask again when it is complete.")
        try:
            return self._path.open("rb")
        except OSError as error:
            raise VideoError(
                f"{self.name} cannot be read: {error.strerror}; check the path and its permissions."
            ) from None

    def _look(self) -> tuple[int, int]:
        """Size and modification time."""
        if self._path is None:
            return 0, 0
        if str(self._path).startswith(("http:/", "https:/")):
            raise VideoError(f"{self.name} is a web address; expected a file: download it first, nothing is fetched.")
        try:
            found = self._path.stat()
        except FileNotFoundError:
            raise VideoError(f"{self.name} does not exist; check the path.") from None
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            reason = getattr(error, "strerror", None) or error
            raise VideoError(f"The video {self.name[:80]!r} cannot be read: {reason}; check the path.") from None
        if not self._path.is_file():
            raise VideoError(f"{self.name} is not a file; expected a video, or a folder of frames.")
        return found.st_size, found.st_mtime_ns

    def _take(self, source: BinaryIO, limits: VideoLimits) -> None:
        """Read a file object to its end: the caller may close it once we return."""
        head = _read(source, IN_MEMORY + 1)
        if len(head) <= IN_MEMORY:
            self._bytes = head
            return
        handle, name = tempfile.mkstemp(prefix="edge-runtime-", suffix=".video")
        weakref.finalize(self, only_here(_remove), name)
        self._path = Path(name)
        n_bytes = 0
        with os.fdopen(handle, "wb") as copy:
            while head:
                n_bytes += copy.write(head)
                check_bytes(self.name, n_bytes, limits)
                head = _read(source, COPY_BYTES)


def _read(source: BinaryIO, n: int) -> bytes:
    found = source.read(n)
    if not isinstance(found, bytes):
        raise VideoError(f"The video's file object gives {type(found).__name__}; open it in binary mode ('rb').")
    return found


def _remove(name: str) -> None:
    with contextlib.suppress(OSError):
        Path(name).unlink()


def check_bytes(name: str, n_bytes: int, limits: VideoLimits) -> None:
    """Check a size against the limit."""
    if limits.most_bytes is not None and n_bytes > limits.most_bytes:
        raise VideoError(
            f"{name} has {n_bytes} bytes or more, at most {limits.most_bytes} are allowed; send a shorter or "
            "smaller one."
        )


def check_seconds(name: str, seconds: float, limits: VideoLimits) -> None:
    """Check a duration against the limit."""
    if limits.most_seconds is not None and seconds > limits.most_seconds:
        raise VideoError(
            f"{name} takes {seconds:.1f} s, at most {limits.most_seconds:g} s are allowed; send a part of it."
        )


def check_pixels(name: str, width: int, height: int, limits: VideoLimits) -> None:
    """Check the size of a frame against the limit, before one is decoded."""
    if width * height > limits.most_pixels:
        raise VideoError(
            f"{name} has frames of {width} x {height} = {width * height} pixels, at most {limits.most_pixels} are "
            "decoded; scale it down."
        )


def _decode_data_uri(uri: str, limits: VideoLimits) -> bytes:
    check_bytes("The video", data_uri_size(uri), limits)
    try:
        return decode_data_uri(uri)
    except ValueError as error:
        raise VideoError(
            f"A data: URI is not valid base64 ({error}); expected 'data:video/mp4;base64,...'."
        ) from None
