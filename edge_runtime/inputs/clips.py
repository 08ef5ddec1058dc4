"""A video in a message → groups of frames, which the prompt treats as pictures and which are decoded when encoded.

A message with a video becomes one with a part per frame; the first of a group carries the group's temporal ids. The
prompt needs only the size of frames, so nothing but the first one is decoded here.

A group's fingerprint covers the video's packets (or picture files), the positions of the frames, how they are cut,
and their ids, but not pixels, as for pictures. So a second question about a video neither decodes nor encodes what is
still in the KV cache or the cache of visual tokens, and only a few groups are in memory at any time: keeping all
slices would take 0.6 MB per frame, 650 MB for the longest videos.
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
    """The chosen frames of a video."""

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
    """Open a video and choose frames.

    Parameters
    ----------
    open_video : opens it, called with (source, limits, watch, rate of pictures).

    Raises
    ------
    VideoError
        When it cannot be decoded, is larger than allowed, or has no frames in the wanted part.
    BackendUnavailable
        When it needs PyAV and that is not installed.
    """
    options = part.options
    source = open_video(part.source, limits, watch, options.fps)
    end_s = source.times[STILL] + 1 / source.rate
    if source.missing_s and (options.end is None or options.end > end_s):
        raise VideoError(
            f"{source.name} is cut short: {source.missing_s:.1f} s are missing after the first {end_s:.1f} s; get it "
            f"again, or use what is there with the option end ({math.floor(10 * end_s) / 10:g} or less)."
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
    """Chosen frames of one video, their parts in a message and their groups of slices.

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
        """The same frames, cut into at most `most` cells each."""
        return Clip(self.chosen, replace(self.options, max_slices=most), self.slicing)

    @cached_property
    def n_frames(self) -> int:
        """Number of chosen frames."""
        return len(self.chosen.choice.indices)

    def group(self, number: int) -> list[FrameGroup]:
        """Slice j of all frames of a group, for every j."""
        return [FrameGroup(self, number, j) for j in range(self.plan.n_slices)]

    def parts(self) -> list[str | ImagePart]:
        """The parts of a message that replace the video."""
        parts: list[str | ImagePart] = []
        times = self.chosen.times_s
        for number, ids in enumerate(self.chosen.choice.temporal_ids):
            if self.options.timestamps:
                parts.append(f"[{clock(times[number][0])}]")
            parts.append(FramePart(b"", clip=self, number=number, ids=tuple(ids)))
            parts += [FramePart(b"", clip=self, number=number)] * (len(ids) - 1)
        return parts

    def facts(self) -> dict[str, Any]:
        """What an answer reports about the video."""
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
    """Number of its group."""
    ids: tuple[int, ...] = ()
    """Temporal ids of the group; only on its first frame."""


@dataclass(frozen=True)
class FrameGroup(LazyGroup):
    """One slice of all frames of a group, decoded when needed."""

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
        """Number of decoded frames of the video, and of chosen ones."""
        return min(self.clip.reader.n_read, self.clip.n_frames), self.clip.n_frames

    def ask(self) -> bool:
        """Request decoding; True if `load` will not wait."""
        return self.clip.reader.ask(self.number)

    def wait(self, timeout_s: float) -> None:
        """Wait until it is decoded, or until the timeout."""
        self.clip.reader.wait(self.number, timeout_s)

    def load(self) -> LoadedGroup:
        """Slices with their temporal ids; waits until they are decoded."""
        last = self.slice_number == self.clip.plan.n_slices - 1
        frames = self.clip.reader.take(self.number, last=last)
        return [
            (Slice(slices[self.slice_number], self.clip.slicing), time)
            for slices, time in zip(frames, self._ids, strict=True)
        ]

    def release(self) -> None:
        """Stop decoding: nobody needs it."""
        self.clip.reader.release()


def expand_videos(
    conversation: Sequence[Message],
    slicing: SlicingConfig,
    limits: VideoLimits,
    on_look: Callable[[float], None],
    open_video: OpenVideo = _open_here,
) -> list[Message]:
    """The conversation with videos replaced by a part for each frame.

    Parameters
    ----------
    on_look : called with the share of the videos that was indexed; what it raises ends the work.
    open_video : as in `choose`.

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
    """Temporal ids of all pictures of a conversation in order, in groups; each still picture is its own group.

    Parameters
    ----------
    given : ids from the caller.

    Raises
    ------
    MessageError
        When a caller gives ids for videos, which have their own.
    """
    frames = [part for part in parts if isinstance(part, FramePart)]
    if given is not None:
        if frames:
            raise MessageError(
                "temporal_ids were given for a conversation with a video, which has its own; send the frames as "
                "pictures, or leave temporal_ids out."
            )
        return given
    return [
        list(part.ids) if isinstance(part, FramePart) else [STILL]
        for part in parts
        if not isinstance(part, FramePart) or part.ids
    ]
