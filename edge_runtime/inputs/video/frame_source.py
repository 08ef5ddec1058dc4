"""What every kind of video offers: how many frames, when, and frame after frame."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

from edge_runtime.inputs.slicing import Size

Watch = Callable[[float], None]
"""Called often with the share that is done, from 0 to 1; what it raises ends the work."""


class FrameCursor(Protocol):
    """Decodes frames of one source; for one thread at a time."""

    def read(self, index: int, watch: Watch) -> Image.Image:
        """The frame at a position: mode RGB, upright. Cheapest when positions ascend.

        Raises
        ------
        VideoError
            When it cannot be decoded.
        """

    def close(self) -> None:
        """Close the file."""


class FrameSource(Protocol):
    """A video that was looked at."""

    name: str
    size: Size
    """Of its frames, upright."""
    rate: float
    """Frames per second, on average."""
    times: Sequence[float]
    """Seconds from the first frame to each, ascending."""
    sampled: bool
    """Whether somebody chose these frames already, so that all of them are to be taken."""
    missing_s: float
    """Seconds at the end that were promised and are not there."""
    facts: Mapping[str, Any]
    """What was done to its frames to show them: `tone_mapped` and `pixel_aspect`."""

    def identity(self, index: int) -> bytes:
        """Fingerprint of all that decides how a frame looks."""

    def open(self) -> FrameCursor:
        """Begin to decode."""


class FileFrames(FrameSource, Protocol):
    """A video that is one file, which another process may go on to decode."""

    digest: bytes
    """Fingerprint of all that decides how its frames look; with the position of one, its identity."""

    def state(self) -> dict[str, Any]:
        """What a cursor needs besides the file, of JSON's kinds; empty for an animation."""


def file_identity(digest: bytes, index: int) -> bytes:
    """Fingerprint of one frame of a file."""
    return digest + index.to_bytes(8, "little")


def frames_between(times: Sequence[float], start: float | None, end: float | None) -> range:
    """Positions of the frames from `start` on and before `end`, in seconds."""
    first = bisect_left(times, start) if start else 0
    return range(first, len(times) if end is None else bisect_left(times, end))


def facts_of(source: FrameSource) -> dict[str, Any]:
    """What is told of a source."""
    return {
        "size": [*source.size],
        "fps": round(source.rate, 6),
        "frames_in_video": len(source.times),
        **source.facts,
    }
