"""The interface of every kind of video: number and times of its frames, and one frame after the other."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

from edge_runtime.inputs.slicing import Size

Watch = Callable[[float], None]
"""Called often with the finished share, from 0 to 1; what it raises ends the work."""


class FrameCursor(Protocol):
    """Decodes frames of one source; used by one thread at a time."""

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
    """An opened video."""

    name: str
    size: Size
    """Size of its frames, upright."""
    rate: float
    """Frames per second, on average."""
    times: Sequence[float]
    """Seconds from the first frame to each, ascending."""
    sampled: bool
    """Whether these frames were already chosen, so that all of them are used."""
    missing_s: float
    """Promised seconds that are missing at the end."""
    facts: Mapping[str, Any]
    """How its frames were processed to show them: `tone_mapped` and `pixel_aspect`."""

    def identity(self, index: int) -> bytes:
        """Fingerprint of everything that decides how a frame looks."""

    def open(self) -> FrameCursor:
        """Start decoding."""


class FileFrames(FrameSource, Protocol):
    """A video that is one file, which another process may decode."""

    digest: bytes
    """Fingerprint of everything that decides how its frames look; with a position, a frame's identity."""

    def state(self) -> dict[str, Any]:
        """What a cursor needs besides the file, as JSON types; empty for an animation."""


def file_identity(digest: bytes, index: int) -> bytes:
    """Fingerprint of one frame of a file."""
    return digest + index.to_bytes(8, "little")


def frames_between(times: Sequence[float], start: float | None, end: float | None) -> range:
    """Positions of the frames from `start` to before `end`, in seconds."""
    first = bisect_left(times, start) if start else 0
    return range(first, len(times) if end is None else bisect_left(times, end))


def facts_of(source: FrameSource) -> dict[str, Any]:
    """What an answer reports about a source."""
    return {
        "size": [*source.size],
        "fps": round(source.rate, 6),
        "frames_in_video": len(source.times),
        **source.facts,
    }
