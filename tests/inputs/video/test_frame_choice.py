"""Frame choice and temporal ids: the recipe's results for given frame counts and rates."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import FIXTURES
from edge_runtime import MessageError
from edge_runtime.inputs.video.frame_choice import MAX_NUM_PACKING, PACKING_LIMIT, choose_frames


def test_choices_equal_the_goldens():
    for entry in json.loads((FIXTURES / "goldens" / "frames.json").read_text()):
        choice = choose_frames(entry["n_frames"], entry["fps"], entry["choose_fps"], entry["force_packing"])
        times, packing = entry["temporal"], entry["packing"]
        assert choice.indices == entry["index"]
        assert choice.temporal_ids == [times[i : i + packing] for i in range(0, len(times), packing)]


@given(st.integers(1, 200_000), st.floats(1, 120), st.integers(1, 10), st.one_of(st.none(), st.integers(1, 6)))
def test_every_choice_is_in_the_video_and_in_order(n_frames, fps, choose_fps, force_packing):
    choice = choose_frames(n_frames, fps, choose_fps, force_packing)
    flat = [t for group in choice.temporal_ids for t in group]
    assert len(flat) == len(choice.indices) <= 180 * MAX_NUM_PACKING
    assert choice.indices == sorted(choice.indices)
    assert 0 <= choice.indices[0] <= choice.indices[-1] < n_frames
    assert flat == sorted(flat)
    assert 0 <= flat[0] <= flat[-1] <= 10 * n_frames / fps
    assert {len(group) for group in choice.temporal_ids[:-1]} <= {len(choice.temporal_ids[0])}


def test_ids_are_truncated_as_officially():
    """43 * 0.1 / 0.1 is 42.99999999999999: 3270 of 72,000 marks lose one so."""
    choice = choose_frames(400, 10, choose_fps=10)
    flat = [t for group in choice.temporal_ids for t in group]
    assert choice.indices == list(range(400))
    lost = [k for k in range(400) if flat[k] == k - 1]
    assert lost[:7] == [43, 81, 86, 91, 162, 167, 172]
    assert all(flat[k] == k for k in range(400) if k not in lost)


def test_packing_can_reach_six_when_allowed():
    choice = choose_frames(3000, 10, force_packing=6, max_packing=PACKING_LIMIT)
    assert {len(group) for group in choice.temporal_ids[:-1]} == {6}
    assert {len(group) for group in choose_frames(3000, 10, force_packing=6).temporal_ids[:-1]} == {MAX_NUM_PACKING}


def test_the_shortest_clip_has_one_frame():
    assert choose_frames(1, 30).indices == [0]
    assert choose_frames(1, 30).temporal_ids == [[0]]


@pytest.mark.parametrize(("n_frames", "fps"), [(0, 25), (10, 0), (10, float("nan")), (10, -5)])
def test_no_frames_or_no_rate_is_refused(n_frames, fps):
    with pytest.raises(MessageError, match="positive rate"):
        choose_frames(n_frames, fps)
