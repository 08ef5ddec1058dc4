"""Odd, damaged and hostile videos: right, or a sentence."""

from __future__ import annotations

import base64
import io
import re
import sys

import av
import numpy as np
import pytest

from edge_runtime import BackendUnavailable, ImageError, VideoError
from edge_runtime.inputs.video import source as video_content
from edge_runtime.inputs.video.frame_choice import VideoLimits
from edge_runtime.inputs.video.open import open_video
from inputs.video.test_files import chosen, quarters, recipe, refused, shown
from support.video_maker import (
    SIZE,
    make_animation,
    make_sound,
    make_video,
    number_of,
)

# --- odd and bad files --------------------------------------------------------------------------------------------


def test_a_video_with_sound_and_one_of_a_single_frame():
    assert shown(chosen(make_video(10, 25, sound=True))) == [5]
    assert shown(chosen(make_video(1, 25))) == [0]


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: b"", "is empty"),
        (lambda: b"hello " * 1000, "cannot be opened as a video"),
        (lambda: make_video(20)[:600], "cannot be opened as a video"),
        (make_sound, "has no pictures"),
        (lambda: make_video(0), "has no pictures|has no frames"),
    ],
)
def test_what_is_not_a_video_is_refused(make, reason, capfd):
    refused(make(), reason)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
def test_a_file_that_is_cut_short_is_refused_but_its_start_can_be_used(kind):
    whole = make_video(100, 25, kind=kind, options={"g": "10"}, header_first=kind == "mp4")
    frames = whole.index(b"mdat" if kind == "mp4" else b"\x1f\x43\xb6\x75")  # where a cluster starts
    cut = whole[: frames + (len(whole) - frames) * 6 // 10]
    with pytest.raises(VideoError, match=r"cut short: .* s are missing after the first .* option end") as told:
        chosen(cut)
    end = float(re.search(r"end \(([\d.]+) or less", str(told.value))[1])
    assert 1.5 < end < 3
    found = chosen(cut, end=end)
    assert shown(found) == found.choice.indices


def test_damage_in_the_middle_is_reported_for_the_wanted_frame(capfd):
    """And for all that depend on it: a decoder continues with what it has, and shows something else."""
    whole = make_video(60, 25, codec="libvpx-vp9", kind="webm", options={"g": "20", "deadline": "realtime"})
    with av.open(io.BytesIO(whole)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0)]
    assert whole.count(packets[20]) == 1
    damaged = whole.replace(packets[20], bytes(len(packets[20])))
    source = open_video(damaged, VideoLimits())
    cursor, calls = source.open(), []
    assert [number_of(cursor.read(i, lambda share: None)) for i in (0, 19, 40, 59)] == [0, 19, 40, 59]
    for index in (20, 21, 39):
        with pytest.raises(VideoError, match=rf"Frame {index} of 60 of The video cannot be decoded"):
            cursor.read(index, calls.append)
    assert len(calls) <= 3 * 23  # from one keyframe to the next, not the whole file again
    assert number_of(cursor.read(10, lambda share: None)) == 10
    cursor.close()
    assert capfd.readouterr().err == ""
    refused(damaged, "leave that part out")
    assert shown(chosen(damaged, end=0.8)) == recipe(20, 25.0)[0]


@pytest.mark.parametrize(
    "kind, codec", [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"), ("mpegts", "libx264")]
)
def test_damaged_files_are_shown_or_refused_and_nothing_else(kind, codec):
    whole, random = make_video(30, 25, kind=kind, codec=codec, options={"g": "10"}), np.random.default_rng(3)
    told = []
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(int(random.integers(1, 8))):
            place = int(random.integers(len(damaged)))
            damaged[place : place + int(random.integers(1, 40))] = random.bytes(int(random.integers(1, 40)))
        try:
            found = chosen(bytes(damaged), fps=10)
            assert len(shown(found)) == len(found.choice.indices)
        except ImageError as error:
            told.append(str(error))
    assert {text[-1] for text in told} == {"."}


def test_a_playlist_opens_nothing(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(make_video(5))
    for text in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {tmp_path}/secret.mp4\n",
    ):
        refused(text.encode(), "cannot be opened as a video")
        (tmp_path / "list.mp4").write_text(text)
        refused(tmp_path / "list.mp4", "cannot be opened as a video")
    refused("http://127.0.0.1:9/a.mp4", "web address")
    refused(tmp_path / "no.mp4", "does not exist")
    refused("a\0.mp4", "cannot be read")


def test_limits_are_checked_before_anything_is_decoded(tmp_path):
    data = make_video(50, 25)
    (tmp_path / "a.mp4").write_bytes(data)
    uri = "data:video/mp4;base64," + base64.b64encode(data).decode()
    for give in (lambda: data, lambda: tmp_path / "a.mp4", lambda: uri, lambda: io.BytesIO(data)):
        refused(give(), f"at most {len(data) - 1} are allowed", VideoLimits(most_bytes=len(data) - 1))
        assert len(open_video(give(), VideoLimits(most_bytes=len(data))).times) == 50
    refused(data, "at most 1.5 s are allowed", VideoLimits(most_seconds=1.5))
    n_pixels = SIZE[0] * SIZE[1]
    refused(data, "are decoded; scale it down", VideoLimits(most_pixels=n_pixels - 1))
    refused(make_animation(3, "GIF", 100), "are decoded; scale it down", VideoLimits(most_pixels=n_pixels - 1))
    refused(make_animation(3, "GIF", 1000), "at most 2 s", VideoLimits(most_seconds=2))
    refused("data:video/mp4;base64,?", "not valid base64")


def test_a_size_that_grows_after_the_header_is_not_decoded():
    """Two streams one after the other, as a bare file: the header describes only the small one."""
    small, large = (make_video([quarters(w, h)] * 5, kind="h264") for w, h in ((96, 64), (960, 640)))
    assert len(open_video(small + large, VideoLimits()).times) == 10
    cursor = open_video(small + large, VideoLimits(most_pixels=96 * 64)).open()
    assert cursor.read(4, lambda share: None).size == (96, 64)
    with pytest.raises(VideoError, match=r"cannot be decoded|are decoded; scale it down"):
        cursor.read(9, lambda share: None)
    cursor.close()
    resized = open_video(small + large, VideoLimits()).open()
    assert resized.read(9, lambda share: None).size == (96, 64)
    resized.close()


def test_a_file_that_changes_is_noticed(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(make_video(20))
    source = open_video(path, VideoLimits())
    path.write_bytes(make_video(21))
    with pytest.raises(VideoError, match="has changed"):
        source.open()


def test_a_file_object_may_be_closed_afterwards(monkeypatch, tmp_path):
    data = make_video(20)
    for most in (1 << 20, 1000):  # kept in memory, and copied to a file
        monkeypatch.setattr(video_content, "IN_MEMORY", most)
        monkeypatch.setattr(video_content.tempfile, "tempdir", str(tmp_path))
        with io.BytesIO(data) as file:
            found = chosen(file)
        assert len([*tmp_path.iterdir()]) == (most == 1000)
        assert shown(found) == found.choice.indices
        del found
    assert not [*tmp_path.iterdir()]
    refused(io.StringIO("text"), "open it in binary mode")


def test_without_pyav_it_says_what_to_install(monkeypatch):
    data = make_video(5)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'edge-runtime\[video\]'"):
        open_video(data, VideoLimits())
    assert len(open_video(make_animation(3, "GIF", 100), VideoLimits()).times) == 3
