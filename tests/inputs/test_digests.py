"""A group's fingerprint covers all that decides its visual tokens: any change gives another fingerprint."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edge_runtime.inputs.clips import Clip, choose
from edge_runtime.inputs.messages import VideoPart
from edge_runtime.inputs.slicing import Slice
from edge_runtime.inputs.video.frame_choice import VideoLimits, VideoOptions
from edge_runtime.pipeline import group_digest
from edge_runtime.weights.config import SlicingConfig
from support.video_maker import numbered

SLICING = SlicingConfig(56, 14, 9, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PACKED = VideoOptions(packing=2)


def group(pixels, ids=(-1,)):
    return [(Slice(frame, SLICING), time) for frame, time in zip(pixels, ids, strict=True)]


def flat(*shape):
    """Pixels whose bytes are the same whatever the shape."""
    return np.full((*shape, 3), 7, np.uint8)


CHANGES = {
    "a pixel": (group([flat(28, 28)]), group([np.where(np.arange(28)[:, None, None] == 3, 8, flat(28, 28))])),
    "the shape of equal bytes": (group([flat(28, 56)]), group([flat(56, 28)])),
    "the temporal id": (group([flat(28, 28)], [4]), group([flat(28, 28)], [5])),
    "a still and a frame": (group([flat(28, 28)], [-1]), group([flat(28, 28)], [0])),
    "the order of times": (group([flat(28, 28)] * 2, [0, 3]), group([flat(28, 28)] * 2, [3, 0])),
    "the number of frames": (group([flat(28, 28)] * 2, [0, 0]), group([flat(28, 28)], [0])),
    "where frames meet": (
        group([flat(14, 14), flat(28, 14)], [0, 0]),
        group([flat(28, 14), flat(14, 14)], [0, 0]),
    ),
}


@pytest.mark.parametrize("one, other", CHANGES.values(), ids=CHANGES)
def test_any_change_gives_another_fingerprint(one, other):
    assert group_digest(one) != group_digest(other)


@given(
    st.lists(st.integers(-1, 2), min_size=1, max_size=3),
    st.lists(st.integers(-1, 2), min_size=1, max_size=3),
    st.tuples(st.sampled_from([(14, 28), (28, 14), (14, 14)]), st.sampled_from([(14, 28), (28, 14), (14, 14)])),
    st.tuples(st.integers(0, 1), st.integers(0, 1)),
)
def test_groups_are_equal_where_all_their_parts_are(one_ids, other_ids, shapes, values):
    groups = [
        group([np.full((*shape, 3), value, np.uint8)] * len(ids), ids)
        for ids, shape, value in zip((one_ids, other_ids), shapes, values, strict=True)
    ]
    same = one_ids == other_ids and shapes[0] == shapes[1] and values[0] == values[1]
    assert (group_digest(groups[0]) == group_digest(groups[1])) == same


def clip(options=PACKED, frames=(0, 1, 2, 3), slicing=SLICING):
    parts = [Image.fromarray(numbered(i)) for i in frames]
    return Clip(choose(VideoPart(parts, options), VideoLimits()), options, slicing)


CLIPS = {
    "the times": clip(VideoOptions(packing=2, fps=2)),
    "the frames": clip(PACKED, (0, 2, 1, 3)),
    "one frame": clip(PACKED, (0, 1, 2, 9)),
    "the groups": clip(VideoOptions(packing=4)),
    "the cells": clip(VideoOptions(packing=2, max_slices=4), slicing=replace(SLICING, scale_resolution=28)),
    "what slices are made of": clip(PACKED, slicing=replace(SLICING, mean=(0.4, 0.5, 0.5))),
}


@pytest.mark.parametrize("other", CLIPS.values(), ids=CLIPS)
def test_groups_of_frames_differ_with_what_they_show_and_when(other):
    def digests(found):
        return [part.digest for number in range(len(found.chosen.groups)) for part in found.group(number)]

    assert digests(clip(PACKED)) == digests(clip(PACKED))
    assert digests(clip(PACKED)) != digests(other)
    assert len(set(digests(other))) == len(digests(other))


def counted(*shape):
    """Pixels whose bytes are the same whatever the shape, and that look different once they are resized."""
    return (np.arange(np.prod(shape) * 3) % 251).astype(np.uint8).reshape(*shape, 3)


SHOWN = {
    "numbers": [numbered(i) for i in range(4)],
    "numbers in another order": [numbered(i) for i in (0, 2, 1, 3)],
    "low": [counted(10, 48)] * 2,
    "high": [counted(12, 40)] * 2,  # one slice, of the same size as that of "low"
}
SLICINGS = [
    SLICING,
    replace(SLICING, scale_resolution=28),
    replace(SLICING, scale_resolution=28, mean=(0.4, 0.5, 0.5)),
]


def test_groups_of_frames_with_one_fingerprint_are_one_group():
    """Their slices are the same, of the same times, whatever else is the same about them."""
    held = {}
    for shown, slicing, most, packing, fps in product(SHOWN.values(), SLICINGS, (1, 2, 3, 4), (1, 2), (1, 3)):
        options = VideoOptions(packing=packing, fps=fps, max_slices=most)
        part = VideoPart([Image.fromarray(pixels) for pixels in shown], options)
        found = Clip(choose(part, VideoLimits()), options, slicing)
        for number in range(len(found.chosen.groups)):
            for frames in found.group(number):
                slices = [
                    (item.config, item.pixels.shape, item.pixels.tobytes(), time) for item, time in frames.load()
                ]
                assert held.setdefault(frames.digest, slices) == slices
    assert len({shape for slices in held.values() for _, shape, *_ in slices}) > 3
