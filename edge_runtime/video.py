"""Which frames of a video are looked at, and how they are packed: numbers in, numbers out.

Source: the recipe of the official model card of MiniCPM-V 4.5 (choose_fps, packing, temporal ids with their
truncation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from edge_runtime.errors import MessageError

MAX_NUM_FRAMES = 180
MAX_NUM_PACKING = 3  # frames per group unless the caller allows more
PACKING_LIMIT = 6  # most frames the resampler was trained to take at once
TIME_SCALE = 0.1  # seconds per temporal id
DEFAULT_CHOOSE_FPS = 3


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
    # The recipe divides by zero for clips shorter than half a frame of choose_fps; one frame is what its author
    # would expect.
    count = max(1, count)
    gap = n_frames / count
    indices = [int(i * gap + gap / 2) for i in range(count)]
    if force_packing:
        packing = max(1, min(force_packing, max_packing))
    n_marks = math.ceil(duration / TIME_SCALE)  # as numpy.arange(0, duration, TIME_SCALE) has
    ids = [_temporal_id(index / fps, n_marks) for index in indices]
    return FrameChoice(indices, [ids[i : i + packing] for i in range(0, count, packing)])


def _temporal_id(time_s: float, n_marks: int) -> int:
    """Nearest mark of k * TIME_SCALE, the lower at a tie, divided by TIME_SCALE and truncated.

    The truncation is official and visible: 43 * 0.1 / 0.1 is below 43 in doubles, which gives 42.
    """
    guess = int(time_s / TIME_SCALE)
    near = [k for k in (guess - 1, guess, guess + 1) if 0 <= k < n_marks] or [max(0, n_marks - 1)]
    best = min(near, key=lambda k: (abs(k * TIME_SCALE - time_s), k))
    return int(best * TIME_SCALE / TIME_SCALE)


def check_groups(temporal_ids: Sequence[Sequence[int]], n_images: int) -> None:
    """Hold a request's groups against its pictures.

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
    """Return a list as it is, and anything else as one value that is no number."""
    return value if isinstance(value, list | tuple) else ["not a list"]
