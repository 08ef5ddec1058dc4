"""Which frames of a video are used, and how they are packed: numbers in, numbers out.

Source: the recipe of the official model card of MiniCPM-V 4.5 (choose_fps, packing, temporal ids with their
truncation).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from edge_runtime.errors import MessageError

MAX_NUM_FRAMES = 180
MAX_NUM_PACKING = 3  # frames per group unless the caller allows more
PACKING_LIMIT = 6  # maximum number of frames that the resampler was trained to take at once
TIME_SCALE = 0.1  # seconds per temporal id
DEFAULT_CHOOSE_FPS = 3


@dataclass(frozen=True)
class VideoOptions:
    """Which part of a video is used; None takes the recipe's value.

    Raises
    ------
    MessageError
        When a value is out of range.
    """

    fps: float | None = None
    """Frames per second to choose (the recipe's choose_fps: 3); for pictures in a folder or a list, which are all
    used, the rate at which they were made (1)."""
    max_frames: int | None = None
    """The recipe's MAX_NUM_FRAMES (180): maximum number of frames, times the packing for long videos."""
    packing: int | None = None
    """Frames that share one set of visual tokens, 1 to 6 (the recipe: 1 to 3, depending on the length)."""
    start: float | None = None
    """Seconds at which the used part starts; ids count from here, as in a file that was cut."""
    end: float | None = None
    """Seconds at which the used part ends."""
    timestamps: bool = False
    """Write the time of its first frame before each group."""
    max_slices: int = 1
    """Maximum number of cells per frame; officially, frames are not cut."""

    def __post_init__(self) -> None:
        for name in ("fps", "start", "end"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and (value > 0 if name == "fps" else value >= 0)):
                wanted = "more than 0" if name == "fps" else "of seconds, 0 or more"
                raise MessageError(f"{name} of a video is {value!r}; expected a number {wanted}.")
        for name, most in (("max_frames", None), ("packing", PACKING_LIMIT), ("max_slices", None)):
            value = getattr(self, name)
            if not _is_count(value, most) and (value is not None or name == "max_slices"):
                wanted = f"a whole number from 1 to {most}" if most else "1 or a larger whole number"
                raise MessageError(f"{name} of a video is {value!r}; expected {wanted}.")
        if not isinstance(self.timestamps, bool):
            raise MessageError(f"timestamps of a video is {self.timestamps!r}; expected true or false.")
        if self.end is not None and self.end <= (self.start or 0):
            raise MessageError(
                f"The part of a video from {self.start or 0:g} to {self.end:g} s is empty; expected an end after its "
                "start."
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> VideoOptions:
        """Options from the keys of a message's part.

        Raises
        ------
        MessageError
            When a key is not an option, or a value is out of range.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise MessageError(f"A video has the option {name!r}; expected one of {', '.join(known)}.")
        return cls(**values)

    def choose(self, n_frames: int, rate: float, *, sampled: bool = False) -> FrameChoice:
        """Frames of a video, or of the part between `start` and `end`, that has `n_frames` at `rate` per second.

        As in the recipe, except for two cases in which it would use a frame more than once, or only one frame: frames
        that somebody has already chosen are all used, and so are those of a recording with fewer frames than the
        recipe would choose (a picture every five seconds).

        Parameters
        ----------
        sampled : the frames were already chosen: all of them are used, as far as `max_frames` allows.
        """
        max_frames, max_packing = self.max_frames or MAX_NUM_FRAMES, self.packing or MAX_NUM_PACKING
        choose_fps = rate if sampled else self.fps or DEFAULT_CHOOSE_FPS
        found = choose_frames(
            n_frames, rate, choose_fps, self.packing, max_frames=max_frames, max_packing=max_packing
        )
        wanted = n_frames
        if not sampled and round(rate) == 0:  # the recipe would round the rate of such a recording to nothing
            wanted = min(n_frames, max(1, round(choose_fps * n_frames / rate)))
        elif not sampled and len(found.indices) <= n_frames:
            return found
        packing = self.packing or min(max_packing, math.ceil(wanted / max_frames))
        return _grouped(_spread(min(wanted, max_frames * packing), n_frames), rate, n_frames, packing)


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _is_count(value: object, most: int | None) -> bool:
    return not isinstance(value, bool) and isinstance(value, int) and 1 <= value <= (most or value)


def clock(seconds: float) -> str:
    """A time for people: `0:05.3`, `1:02:03.0`."""
    tenths = round(10 * seconds)
    hours, minutes = divmod(tenths // 600, 60)
    rest = f"{tenths % 600 / 10:04.1f}"
    return f"{hours}:{minutes:02}:{rest}" if hours else f"{minutes}:{rest}"


@dataclass(frozen=True)
class VideoLimits:
    """Limits for untrusted videos."""

    most_bytes: int | None = None
    """Size of a file."""
    most_seconds: float | None = None
    """Length of a video."""
    most_pixels: int = 8192 * 4320
    """Pixels of one decoded frame; a decoder holds up to twenty frames."""


@dataclass(frozen=True)
class FrameChoice:
    """Frames to decode and their times."""

    indices: list[int]
    """Positions in the video, ascending."""
    temporal_ids: list[list[int]]
    """Ids in units of `TIME_SCALE`, cut into groups that share 64 visual tokens."""


def choose_frames(
    n_frames: int,
    fps: float,
    choose_fps: float = DEFAULT_CHOOSE_FPS,
    force_packing: int | None = None,
    *,
    max_frames: int = MAX_NUM_FRAMES,
    max_packing: int = MAX_NUM_PACKING,
) -> FrameChoice:
    """Choose frames and temporal ids for a video of `n_frames` at `fps` frames per second.

    Raises
    ------
    MessageError
        When the video has no frames or no rate.
    """
    if n_frames < 1 or not math.isfinite(fps) or fps <= 0:
        raise MessageError(
            f"The video has {n_frames} frames at {fps} per second; expected at least one frame and a positive rate."
        )
    duration = n_frames / fps
    if choose_fps * int(duration) <= max_frames:
        packing, count = 1, round(min(choose_fps, round(fps)) * min(max_frames, duration))
    else:
        packing = math.ceil(duration * choose_fps / max_frames)
        count = round(duration * choose_fps)
        if packing > max_packing:
            packing, count = max_packing, max_frames * max_packing
    # The recipe divides by zero for clips shorter than half a frame of choose_fps; its author would expect one frame.
    count = max(1, count)
    if force_packing:
        packing = max(1, min(force_packing, max_packing))
    return _grouped(_spread(count, n_frames), fps, n_frames, packing)


def _spread(count: int, n_frames: int) -> list[int]:
    """Positions of `count` frames, each in the middle of its share of the video."""
    gap = n_frames / count
    return [int(i * gap + gap / 2) for i in range(count)]


def _grouped(indices: list[int], fps: float, n_frames: int, packing: int) -> FrameChoice:
    """Frames with their temporal ids, in groups of `packing`."""
    n_marks = math.ceil(n_frames / fps / TIME_SCALE)  # as numpy.arange(0, duration, TIME_SCALE) has
    ids = [_temporal_id(index / fps, n_marks) for index in indices]
    return FrameChoice(indices, [ids[i : i + packing] for i in range(0, len(ids), packing)])


def _temporal_id(time_s: float, n_marks: int) -> int:
    """Nearest mark k * TIME_SCALE, the lower one for ties, divided by TIME_SCALE and truncated.

    The truncation is official and visible: 43 * 0.1 / 0.1 is below 43 in doubles, which gives 42.
    """
    guess = int(time_s / TIME_SCALE)
    near = [k for k in (guess - 1, guess, guess + 1) if 0 <= k < n_marks] or [max(0, n_marks - 1)]
    best = min(near, key=lambda k: (abs(k * TIME_SCALE - time_s), k))
    return int(best * TIME_SCALE / TIME_SCALE)


def check_groups(temporal_ids: Sequence[Sequence[int]], n_images: int) -> None:
    """Check a request's groups against its pictures.

    Raises
    ------
    MessageError
        When a group is empty or the groups do not cover the pictures exactly.
    """
    if not all(isinstance(t, Integral) for group in _lists(temporal_ids) for t in _lists(group)):
        raise MessageError(f"The temporal ids are {str(temporal_ids)[:60]}; expected lists of whole numbers.")
    covered = sum(len(group) for group in temporal_ids)
    if covered != n_images or not all(len(group) for group in temporal_ids):
        raise MessageError(
            f"The temporal ids cover {covered} pictures in {len(temporal_ids)} groups, the messages hold "
            f"{n_images}; expected one id for each picture and no empty group."
        )
    worst = min((t for group in temporal_ids for t in group), default=0)
    if worst < -1:
        raise MessageError(f"A temporal id is {worst}; expected -1 (a still picture) or more.")


def _lists(value: object) -> Sequence[object]:
    """Return a list as it is, and anything else as one value that is not a number."""
    return value if isinstance(value, list | tuple) else ["not a list"]
