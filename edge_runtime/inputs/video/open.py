"""A video of any kind → its frames: pictures in order, an animation that Pillow reads, or a file for PyAV."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import features

from edge_runtime.inputs.video.frame_choice import VideoLimits
from edge_runtime.inputs.video.frame_source import FileFrames, FrameCursor, FrameSource, Watch
from edge_runtime.inputs.video.picture_frames import (
    FOLDER_RATE,
    AnimationCursor,
    AnimationFrames,
    PictureFrames,
    pictures_in,
)
from edge_runtime.inputs.video.source import Content, VideoSource
from edge_runtime.system.base64_data import is_data_uri


def open_video(
    source: VideoSource,
    limits: VideoLimits,
    watch: Watch = lambda share: None,
    *,
    rate: float | None = None,
) -> FrameSource:
    """Open a video: count its frames, decode the first.

    Parameters
    ----------
    rate : frames per second of pictures without times.

    Raises
    ------
    VideoError
        When there is no video, it cannot be decoded, or it is larger than allowed.
    BackendUnavailable
        When it needs PyAV and that is not installed.
    """
    if isinstance(source, list | tuple):
        return PictureFrames("The video", source, rate or FOLDER_RATE, limits)
    if isinstance(source, str | Path) and not is_data_uri(str(source)) and Path(source).is_dir():
        return PictureFrames(str(source), pictures_in(Path(source)), rate or FOLDER_RATE, limits)
    content = Content(source, limits)
    return open_file(content, limits, watch)


def open_file(content: Content, limits: VideoLimits, watch: Watch) -> FileFrames:
    """Open a video that is one file; errors as in `open_video`."""
    with content.open() as file:
        head = file.read(16)
    if _is_animation(head):
        return AnimationFrames(content, limits, watch)
    from edge_runtime.inputs.video.container import VideoFile

    return VideoFile(content, limits, watch)


def open_cursor(content: Content, limits: VideoLimits, state: Mapping[str, Any]) -> FrameCursor:
    """Start decoding a file that was opened in another process.

    Parameters
    ----------
    state : what `FileFrames.state` returned there.
    """
    if not state:
        return AnimationCursor(content, limits)
    from edge_runtime.inputs.video.container import cursor_from

    return cursor_from(content, limits, state)


def _is_animation(head: bytes) -> bool:
    """Whether Pillow reads the frames of a file: GIF, APNG, WebP, and AVIF if it was built with it."""
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return bool(features.check("avif"))
    return head.startswith((b"GIF8", b"\x89PNG")) or (head[:4], head[8:12]) == (b"RIFF", b"WEBP")
