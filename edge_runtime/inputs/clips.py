"""A video in a message → frames in groups, which stand in the prompt as pictures and are decoded when encoded.

A message with a video becomes one with a part per frame; the first of a group brings the group's temporal ids. Of
frames the prompt needs only their size, so nothing is decoded here but the first one.

A group's fingerprint is that of the video's packets (or picture files), the frames' positions, how they are cut, and
their ids: not of pixels, as for pictures. So a second question about a video neither decodes nor encodes what the KV
cache or the cache of visual tokens still has, and at no time are more than a few groups in memory: keeping the slices
themselves would take 0.6 MB per frame, 650 MB for the longest videos.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from PIL import Image

from edge_runtime.errors import MessageError, VideoError
from edge_runtime.inputs.messages import ImagePart, Message, VideoPart
from edge_runtime.inputs.slice_groups import STILL, LazyGroup, LoadedGroup
from edge_runtime.inputs.slicing import Slice, check_plan, cut_picture, plan_slices
from edge_runtime.inputs.video.frame_choice import FrameChoice, VideoLimits, VideoOptions, clock
from edge_runtime.inputs.video.frame_source import FrameSource, Watch, facts_of, frames_between
from edge_runtime.inputs.video.open import open_video
from edge_runtime.inputs.video.reader import FrameReader, Pixels
from edge_runtime.inputs.video.source import VideoSource
from edge_runtime.weights.config import SlicingConfig


@dataclass(frozen=True)
class Chosen:
    """Frames of a video that are looked at."""

    source: FrameSource
    choice: FrameChoice
    """Positions in the whole video."""

    @cached_property
    def groups(self) -> list[list[int]]:
        """Positions of the frames of each group."""
        indices = iter(self.choice.indices)
        return [[next(indices) for _ in ids] for ids in self.choice.temporal_ids]

    @property
    def times_s(self) -> list[list[float]]:
        """When each frame of each group is shown, in seconds from the first frame of the video."""
        return [[round(float(self.source.times[i]), 6) for i in group] for group in self.groups]


OpenVideo = Callable[[VideoSource, VideoLimits, Watch, float | None], FrameSource]


def _open_here(source: VideoSource, limits: VideoLimits, watch: Watch, rate: float | None) -> FrameSource:
    return open_video(source, limits, watch, rate=rate)


def choose(
    part: VideoPart, limits: VideoLimits, watch: Watch = lambda share: None, open_video: OpenVideo = _open_here
) -> Chosen:
    """Look at a video and choose frames.

    Parameters
    ----------
    open_video : what opens it, with (source, limits, watch, rate of pictures).

    Raises
    ------
    VideoError
        When it cannot be decoded, is larger than was allowed, or has nothing in the part that is wanted.
    BackendUnavailable
        When it needs PyAV and that is not installed.
    """
    options = part.options
    source = open_video(part.source, limits, watch, options.fps)
    end_s = source.times[STILL] + 1 / source.rate
    if source.missing_s and (options.end is None or options.end > end_s):
        raise VideoError(
            f"{source.name} is cut short: {source.missing_s:.1f} s are missing behind the first {end_s:.1f} s; get "
            f"it again, or look at what is there with the option end ({math.floor(10 * end_s) / 10:g} or less)."
        )
    wanted = frames_between(source.times, options.start, options.end)
    if not wanted:
        raise VideoError(
            f"{source.name} takes {end_s:.1f} s and has no frame from {options.start or 0:g} s to "
            f"{end_s if options.end is None else options.end:g} s; choose another part."
        )
    choice = options.choose(len(wanted), source.rate, sampled=source.sampled)
    return Chosen(source, FrameChoice([wanted[i] for i in choice.indices], choice.temporal_ids))


class Clip:
    """Chosen frames of one video, and what becomes of them.

    Parameters
    ----------
    slicing : of the model.
    """

    def __init__(self, chosen: Chosen, options: VideoOptions, slicing: SlicingConfig) -> None:
        self.chosen, self.slicing, self.options = chosen, slicing, options
        self.size = chosen.source.size
        self.plan = plan_slices(*self.size, slicing, options.max_slices)
        check_plan(*self.size, self.plan, slicing)
        plan = self.plan

        def cut(picture: Image.Image) -> list[Pixels]:
            return cut_picture(picture, plan)

        self.reader = FrameReader(chosen.source, chosen.groups, cut)

    def cut_into(self, most: int) -> Clip:
        """The same frames in at most so many cells each."""
        return Clip(self.chosen, replace(self.options, max_slices=most), self.slicing)

    @cached_property
    def n_frames(self) -> int:
        """Frames that are looked at."""
        return len(self.chosen.choice.indices)

    def group(self, number: int) -> list[FrameGroup]:
        """Slice j of all frames of a group, for every j."""
        return [FrameGroup(self, number, j) for j in range(self.plan.n_slices)]

    def parts(self) -> list[str | ImagePart]:
        """What stands in a message for the video."""
        parts: list[str | ImagePart] = []
        times = self.chosen.times_s
        for number, ids in enumerate(self.chosen.choice.temporal_ids):
            if self.options.timestamps:
                parts.append(f"[{clock(times[number][0])}]")
            parts.append(FramePart(b"", clip=self, number=number, ids=tuple(ids)))
            parts += [FramePart(b"", clip=self, number=number)] * (len(ids) - 1)
        return parts

    def facts(self) -> dict[str, Any]:
        """What is told with an answer."""
        source, choice = self.chosen.source, self.chosen.choice
        return {
            **facts_of(source),
            "seconds": round(float(source.times[STILL]) + 1 / source.rate, 6),
            "packing": max(map(len, choice.temporal_ids)),
            "times_s": self.chosen.times_s,
            "temporal_ids": choice.temporal_ids,
        }


@dataclass(frozen=True)
class FramePart(ImagePart):
    """A frame inside a message."""

    clip: Clip = field(kw_only=True)
    number: int = field(kw_only=True)
    """Of its group."""
    ids: tuple[int, ...] = ()
    """Temporal ids of the group; of its first frame alone."""


@dataclass(frozen=True)
class FrameGroup(LazyGroup):
    """One slice of all frames of a group, decoded when it is needed."""

    clip: Clip
    number: int
    slice_number: int

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def _ids(self) -> Sequence[int]:
        return self.clip.chosen.choice.temporal_ids[self.number]

    @property
    def n_patches(self) -> int:
        """Patches of all its slices."""
        width, height = self.clip.plan.sizes[self.slice_number]
        return len(self) * width * height // self.clip.slicing.patch_size**2

    @property
    def digest(self) -> bytes:
        """Fingerprint of all that decides its visual tokens."""
        clip, digest = self.clip, hashlib.blake2b(digest_size=16)
        digest.update(repr(("frames", clip.plan, self.slice_number, clip.slicing, list(self._ids))).encode())
        for index in clip.chosen.groups[self.number]:
            digest.update(clip.chosen.source.identity(index))
        return digest.digest()

    @property
    def reading(self) -> tuple[int, int]:
        """Frames of the video that were decoded, and those that are looked at."""
        return min(self.clip.reader.n_read, self.clip.n_frames), self.clip.n_frames

    def ask(self) -> bool:
        """Have it decoded; True when `load` will not wait."""
        return self.clip.reader.ask(self.number)

    def wait(self, timeout_s: float) -> None:
        """Wait until it is decoded, or the time is up."""
        self.clip.reader.wait(self.number, timeout_s)

    def load(self) -> LoadedGroup:
        """Slices with their temporal ids; waits for them."""
        last = self.slice_number == self.clip.plan.n_slices - 1
        frames = self.clip.reader.take(self.number, last=last)
        return [
            (Slice(slices[self.slice_number], self.clip.slicing), time)
            for slices, time in zip(frames, self._ids, strict=True)
        ]

    def release(self) -> None:
        """Nobody needs it: stop decoding."""
        self.clip.reader.release()


def expand_videos(
    conversation: Sequence[Message],
    slicing: SlicingConfig,
    limits: VideoLimits,
    on_look: Callable[[float], None],
    open_video: OpenVideo = _open_here,
) -> list[Message]:
    """The conversation with a part for each frame in the place of videos.

    Parameters
    ----------
    on_look : called with the share of the videos that was looked at; what it raises ends the work.
    open_video : as of `choose`.

    Raises
    ------
    VideoError, BackendUnavailable
        When a video cannot be used; nothing was computed then.
    """
    n_videos = sum(isinstance(part, VideoPart) for message in conversation for part in message.parts)
    done = 0

    def watch(share: float) -> None:
        on_look((done + share) / n_videos)

    expanded = []
    for message in conversation:
        parts: list[str | ImagePart | VideoPart] = []
        for part in message.parts:
            if isinstance(part, VideoPart):
                parts += Clip(choose(part, limits, watch, open_video), part.options, slicing).parts()
                done += 1
            else:
                parts.append(part)
        expanded.append(Message(message.role, tuple(parts), message.reasoning, message.tool_calls))
    return expanded


def group_ids(parts: Sequence[ImagePart], given: Sequence[Sequence[int]] | None) -> Sequence[Sequence[int]]:
    """Temporal ids of all pictures of a conversation in order, in groups; stills are groups of their own.

    Parameters
    ----------
    given : ids by the caller.

    Raises
    ------
    MessageError
        When a caller gives ids for videos, which bring their own.
    """
    frames = [part for part in parts if isinstance(part, FramePart)]
    if given is not None:
        if frames:
            raise MessageError(
                "temporal_ids were given for a conversation with a video, which brings its own; send the frames as "
                "pictures, or leave temporal_ids out."
            )
        return given
    return [
        list(part.ids) if isinstance(part, FramePart) else [STILL]
        for part in parts
        if not isinstance(part, FramePart) or part.ids
    ]
