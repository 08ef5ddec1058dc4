"""Which slices are encoded next, and what is asked for meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from edge_runtime.engine.slice_batches import GROUPS_AHEAD, next_batch
from edge_runtime.engine.task import Pictures
from edge_runtime.inputs.slice_groups import LazyGroup, LoadedGroup


class Frame(LazyGroup):
    """A group of a video, of ten patches, whose decoding is finished by hand."""

    def __init__(self, name: str, *, is_made: bool = False, fails: bool = False) -> None:
        self.name, self.is_made, self.fails = name, is_made, fails
        self.n_asked = 0

    n_patches = 10
    digest = b""
    reading = (0, 1)

    def __len__(self) -> int:
        return 1

    def ask(self) -> bool:
        """Noted."""
        self.n_asked += 1
        return self.is_made

    def wait(self, timeout_s: float) -> None:
        """Nothing is waited for."""

    def load(self) -> LoadedGroup:
        """Only what is made is loaded: it would block."""
        assert self.is_made
        if self.fails:
            raise ValueError(self.name)
        return []

    def release(self) -> None:
        """Not here."""


class Waiting(SimpleNamespace):
    """Stands for a task; tasks are told apart as objects."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def video(*frames: Frame) -> Any:
    return Waiting(pictures=Pictures(missing={frame.name.encode(): frame for frame in frames}))


def asked(*frames: Frame) -> list[bool]:
    return [frame.n_asked > 0 for frame in frames]


def test_frames_are_read_ahead_while_one_is_encoded():
    """As many as are said, and no more: each is a picture in memory."""
    assert GROUPS_AHEAD == 2
    frames = [Frame(f"f{i}", is_made=i == 0) for i in range(6)]
    batch = next_batch([video(*frames)], max_patches=10)
    assert [*batch.groups] == [b"f0"]
    assert not batch.waiting
    assert asked(*frames) == [True] * (1 + GROUPS_AHEAD) + [False] * 3


@pytest.mark.parametrize("max_patches", [20, 25])
def test_reading_ahead_begins_behind_what_is_encoded(max_patches):
    frames = [Frame(f"f{i}", is_made=True) for i in range(6)]
    batch = next_batch([video(*frames)], max_patches)
    assert [*batch.groups] == [b"f0", b"f1"]
    assert asked(*frames) == [True] * (2 + GROUPS_AHEAD) + [False] * 2


def test_further_frames_are_read_while_the_first_is_not_made():
    """All that a video waits for is asked for together, not one after another."""
    frames = [Frame(f"f{i}") for i in range(5)]
    task = video(*frames)
    batch = next_batch([task], max_patches=100)
    assert not batch.groups
    assert batch.waiting == {task: frames[0]}
    assert asked(*frames) == [True, True, False, False, False]


def test_every_video_is_read_ahead():
    first, second = ([Frame(f"{name}{i}", is_made=True) for i in range(4)] for name in "ab")
    batch = next_batch([video(*first), video(*second)], max_patches=10)
    assert [*batch.groups] == [b"a0"]
    assert asked(*first) == [True, True, True, False]
    assert asked(*second) == [True, True, False, False], "it had no place, and its beginning is read meanwhile"


def test_a_frame_that_cannot_be_made_ends_its_own_video_alone():
    bad, good = video(Frame("a0", is_made=True, fails=True), Frame("a1", is_made=True)), Frame("b0", is_made=True)
    batch = next_batch([bad, video(good)], max_patches=100)
    assert [*batch.groups] == [b"b0"]
    assert [*batch.failed] == [bad]
    assert str(batch.failed[bad]) == "a0"
