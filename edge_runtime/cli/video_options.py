"""Videos on the command line: their options, and which of the named files are videos."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from PIL import Image

from edge_runtime.cli.piped import Piped
from edge_runtime.inputs.messages import VIDEO_SUFFIXES, VideoPart
from edge_runtime.inputs.video.frame_choice import PACKING_LIMIT, VideoLimits, VideoOptions, clock

ANIMATIONS = (".apng", ".avif", ".gif", ".png", ".webp")

_VIDEO_HEADS = (
    *(b"\x1aE\xdf\xa3", b"FLV\x01", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),  # Matroska, Flash, ASF
    *(b"\0\0\x01\xba", b"\0\0\x01\xb3", b"\x06\x0e\x2b\x34", b"OggS"),  # MPEG, MXF, Ogg
)
_QUICKTIME = (b"moov", b"mdat", b"wide", b"free", b"skip")  # old files start with one of these
_PACKETS = ((0, 188), (4, 192))  # MPEG-TS: offset of the packet mark, and distance between marks
_PICTURE_BRANDS = (b"hei", b"hev", b"mif1", b"msf1", b"avif", b"avis")


class Time(click.ParamType[float]):
    """Seconds, or `minutes:seconds`, or `hours:minutes:seconds`."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        if isinstance(value, float):
            return value
        if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d*)?", value):
            self.fail(f"{value!r} is not a time; expected seconds, or 1:30, or 1:02:03.5.", param, ctx)
        seconds = 0.0
        for part in value.split(":"):
            seconds = 60 * seconds + float(part)
        return seconds


def video_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options for all videos of a request; what is not given follows the official recipe."""
    time: dict[str, Any] = {"type": Time(), "metavar": "TIME"}
    for option in reversed(
        (
            click.option(
                "--fps", type=click.FloatRange(0, min_open=True), metavar="X", help="Video frames per second.  [3]"
            ),
            click.option(
                "--max-frames", type=click.IntRange(1), metavar="N", help="Maximum; times packing if long.  [180]"
            ),
            click.option(
                "--packing",
                type=click.IntRange(1, PACKING_LIMIT),
                metavar="N",
                help="Frames per group, 1 to 6.  [1 to 3, by length]",
            ),
            click.option("--start", **time, help="Start of the part to use: 90 or 1:30."),
            click.option("--end", **time, help="Its end."),
            click.option("--timestamps", is_flag=True, help="Tell the model the time of each group."),
        )
    ):
        command = option(command)
    return command


def take_video(options: dict[str, Any]) -> VideoOptions:
    """Remove the values of `video_options` from a command's options."""
    return VideoOptions(**{name: options.pop(name) for name in asdict(VideoOptions()) if name != "max_slices"})


def with_videos(content: Sequence[str | Path | Piped], options: VideoOptions) -> list[str | Path | Piped | VideoPart]:
    """The content of a message, with a part for each path, or bytes of a pipe, that is a video.

    Raises
    ------
    click.UsageError
        When there are options for videos and no video.
    """
    found = [VideoPart(p, options) if not isinstance(p, str) and is_video(p) else p for p in content]
    if options != VideoOptions() and not any(isinstance(part, VideoPart) for part in found):
        given = next(name for name, value in asdict(options).items() if value != getattr(VideoOptions(), name))
        raise click.UsageError(f"--{given.replace('_', '-')} needs a video: name one, or a folder of frames.")
    return found


def is_video(source: Path | bytes) -> bool:
    """Whether a path is a folder of frames, a video file or an animated picture; bytes are judged by their start."""
    if isinstance(source, bytes):
        if _begins_like_a_video(source[:1024]):
            return True
    elif source.is_dir() or source.suffix.lower() in VIDEO_SUFFIXES:
        return True
    elif source.suffix.lower() not in ANIMATIONS:
        return False
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            return bool(getattr(picture, "is_animated", False))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False  # reading it as a picture reports the reason


def _begins_like_a_video(head: bytes) -> bool:
    """Whether these are the first bytes of a container of videos."""
    if head[4:8] == b"ftyp":
        return not head[8:12].startswith(_PICTURE_BRANDS)
    is_stream = any(head[at : at + 1] == head[at + size : at + size + 1] == b"G" for at, size in _PACKETS)
    return is_stream or head[4:8] in _QUICKTIME or head.startswith(_VIDEO_HEADS) or head[8:12] == b"AVI "


def look_at(part: VideoPart) -> str:
    """Open a video before a question about it, and describe what the model will see.

    Raises
    ------
    VideoError, BackendUnavailable
        When it cannot be used.
    """
    from edge_runtime.inputs.clips import choose

    chosen = choose(part, VideoLimits())
    ids, seconds = chosen.choice.temporal_ids, chosen.source.times[-1] + 1 / chosen.source.rate
    frames = len(chosen.choice.indices)
    return f"{Path(str(part.source)).name} ({clock(seconds)}, {frames} frames in {len(ids)} groups)"


def draw(part: VideoPart, target: Path, watch: Callable[[float], None]) -> None:
    """Write the storyboard of a video."""
    from edge_runtime.generation.grounding import save_drawing
    from edge_runtime.inputs.clips import choose
    from edge_runtime.inputs.storyboard import draw_storyboard

    save_drawing(draw_storyboard(choose(part, VideoLimits()), watch), target)
