"""Videos on the command line: their options, and which of the files that were named are videos."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from PIL import Image

from edge_runtime.messages import VIDEO_SUFFIXES, VideoPart
from edge_runtime.video import PACKING_LIMIT, VideoLimits, VideoOptions, clock

ANIMATIONS = (".apng", ".avif", ".gif", ".png", ".webp")


class Time(click.ParamType[float]):
    """Seconds, or `minutes:seconds`, or `hours:minutes:seconds`."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        if isinstance(value, float):
            return value
        if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d*)?", value):
            self.fail(f"{value!r} is no time; expected seconds, or 1:30, or 1:02:03.5.", param, ctx)
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
                "--max-frames", type=click.IntRange(1), metavar="N", help="Most, times packing if long.  [180]"
            ),
            click.option(
                "--packing",
                type=click.IntRange(1, PACKING_LIMIT),
                metavar="N",
                help="Frames per group, 1 to 6.  [1 to 3, by length]",
            ),
            click.option("--start", **time, help="Begin of the part to look at: 90 or 1:30."),
            click.option("--end", **time, help="Its end."),
            click.option("--timestamps", is_flag=True, help="Tell the model the time of each group."),
            click.option(
                "--storyboard",
                type=click.Path(path_type=Path),
                metavar="OUT.png",
                help="Draw which frames go into which group.",
            ),
        )
    ):
        command = option(command)
    return command


def take_video(options: dict[str, Any]) -> VideoOptions:
    """Take the values of `video_options`, but the storyboard, out of a command's options."""
    return VideoOptions(**{name: options.pop(name) for name in asdict(VideoOptions()) if name != "max_slices"})


def with_videos(content: Sequence[str | Path], options: VideoOptions) -> list[str | Path | VideoPart]:
    """The content of a message, with a part for each path that is a video.

    Raises
    ------
    click.UsageError
        When there are options for videos and no video.
    """
    found = [VideoPart(p, options) if isinstance(p, Path) and is_video(p) else p for p in content]
    if options != VideoOptions() and not any(isinstance(part, VideoPart) for part in found):
        given = next(name for name, value in asdict(options).items() if value != getattr(VideoOptions(), name))
        raise click.UsageError(f"--{given.replace('_', '-')} needs a video: name one, or a folder of frames.")
    return found


def is_video(path: Path) -> bool:
    """Whether a path is a folder of frames, a video file, or a picture that moves."""
    if path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES:
        return True
    if path.suffix.lower() not in ANIMATIONS:
        return False
    try:
        with Image.open(path) as picture:
            return bool(getattr(picture, "is_animated", False))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False  # as a picture it is refused with the reason


def look_at(part: VideoPart) -> str:
    """Look at a video before it is asked about, and say what will be seen of it.

    Raises
    ------
    VideoError, BackendUnavailable
        When it cannot be used.
    """
    from edge_runtime.clips import choose

    chosen = choose(part, VideoLimits())
    ids, seconds = chosen.choice.temporal_ids, chosen.source.times[-1] + 1 / chosen.source.rate
    frames = len(chosen.choice.indices)
    return f"{Path(str(part.source)).name} ({clock(seconds)}, {frames} frames in {len(ids)} groups)"


def draw(part: VideoPart, target: Path, watch: Callable[[float], None]) -> None:
    """Write the storyboard of a video."""
    from edge_runtime.clips import choose
    from edge_runtime.grounding import save_drawing
    from edge_runtime.storyboard import draw_storyboard

    save_drawing(draw_storyboard(choose(part, VideoLimits()), watch), target)
