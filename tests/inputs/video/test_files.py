"""Frames of files: which are chosen and when they are shown, found by seeking; odd and bad files."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from edge_runtime import ImageError, VideoError
from edge_runtime.inputs.clips import choose
from edge_runtime.inputs.messages import VideoPart
from edge_runtime.inputs.video.frame_choice import VideoLimits, VideoOptions
from edge_runtime.inputs.video.open import open_video
from support.video_maker import (
    make_animation,
    make_video,
    number_of,
    numbered,
    write_frames,
)

UNLIMITED = VideoLimits()
RATES = [25, Fraction(30000, 1001), 30, 60]


def chosen(source, **options):
    return choose(VideoPart(source, VideoOptions(**options)), VideoLimits())


def shown(found) -> list[int]:
    """Numbers on the chosen frames."""
    cursor = found.source.open()
    try:
        return [number_of(cursor.read(i, lambda share: None)) for i in found.choice.indices]
    finally:
        cursor.close()


def refused(source, reason, limits=UNLIMITED, **options):
    with pytest.raises(VideoError, match=reason) as told:
        shown(choose(VideoPart(source, VideoOptions(**options)), limits))
    assert str(told.value)[-1] == "."


def recipe(n_frames, fps, choose_fps=3, force_packing=None, most=180, most_packing=3):
    """The model card's code, section by section where possible; returns positions and groups of ids."""
    duration = n_frames / fps
    if choose_fps * int(duration) <= most:
        packing, count = 1, round(min(choose_fps, round(fps)) * min(most, duration))
    else:
        packing = math.ceil(duration * choose_fps / most)
        if packing <= most_packing:
            count = round(duration * choose_fps)
        else:
            count, packing = round(most * most_packing), most_packing
    gap = n_frames / count
    indices = [int(i * gap + gap / 2) for i in range(count)]
    packing = min(force_packing, most_packing) if force_packing else packing
    marks = np.arange(0, duration, 0.1)
    ids = [int(marks[np.argmin(np.abs(marks - i / fps))] / 0.1) for i in indices]
    return indices, [ids[i : i + packing] for i in range(0, count, packing)]


# --- which frames -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(
    "options", [{}, {"packing": 2}, {"max_frames": 6}, {"fps": 5, "max_frames": 4, "packing": 6}]
)
def test_frames_and_ids_are_the_recipes(rate, options):
    """With `packing`, which is the recipe's MAX_NUM_PACKING too."""
    n = round(2.3 * rate)
    found = chosen(make_video(n, rate, options={"preset": "ultrafast", "g": "20"}), **options)
    packing = options.get("packing")
    indices, groups = recipe(
        n, float(rate), options.get("fps", 3), packing, options.get("max_frames", 180), packing or 3
    )
    assert found.source.rate == float(rate)
    assert found.choice.indices == indices
    assert found.choice.temporal_ids == groups
    assert shown(found) == indices
    assert np.allclose(np.concatenate(found.times_s), np.array(indices) / float(rate), atol=1e-4)


@pytest.mark.parametrize("kind, codec", [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9")])
def test_a_variable_rate_is_chosen_by_position_and_reported_by_time(kind, codec):
    """Officially positions count, and ids come from the average rate; the reported times are those of the frames."""
    n, slow = 60, 40  # then every frame takes five times as long
    ticks = [i if i < slow else slow + 5 * (i - slow) for i in range(n)]
    found = chosen(make_video(n, 25, kind=kind, codec=codec, times=lambda i: ticks[i]))
    measured = (n - 1) / (ticks[-1] / 25)
    assert found.source.rate == pytest.approx(measured, rel=0.05)
    indices, groups = recipe(n, found.source.rate)
    assert (found.choice.indices, found.choice.temporal_ids) == (indices, groups)
    assert shown(found) == indices
    assert np.allclose(np.concatenate(found.times_s), [ticks[i] / 25 for i in indices], atol=2e-3)


def test_a_part_is_used_as_if_it_were_cut_out():
    data = make_video(100, 25, options={"preset": "ultrafast", "g": "10"})
    found = chosen(data, start=1.0, end=3.0)
    indices, groups = recipe(50, 25.0)
    assert found.choice.indices == shown(found) == [25 + i for i in indices]
    assert found.choice.temporal_ids == groups
    assert found.times_s[0][0] == pytest.approx((25 + indices[0]) / 25)
    assert chosen(data, start=3.5).choice.indices[-1] >= 87
    with pytest.raises(VideoError, match=r"takes 4\.0 s and has no frame from 5 s to 6 s"):
        chosen(data, start=5, end=6)


# --- how they are found -------------------------------------------------------------------------------------------


KINDS = {
    "mp4 with B-frames": ("mp4", "libx264", {"bf": "3", "g": "12", "x264-params": "open-gop=1"}),
    "matroska": ("matroska", "libx264", {"bf": "2", "g": "15"}),
    "every frame a key": ("mp4", "libx264", {"g": "1"}),
    "one key": ("mp4", "libx264", {"g": "999", "bf": "2", "preset": "ultrafast"}),
    "hevc": (
        "mp4",
        "libx265",
        {"x265-params": "log-level=none:keyint=12:bframes=3:open-gop=1:pools=1", "preset": "fast"},
    ),
    "vp9": ("webm", "libvpx-vp9", {"g": "10", "deadline": "realtime"}),
    "transport stream": ("mpegts", "libx264", {"bf": "2", "g": "12"}),
    "avi, which has no times": ("avi", "mpeg4", {"g": "12"}),
    "motion jpeg": ("avi", "mjpeg", {}),
    "bare h264": ("h264", "libx264", {"g": "12"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_any_frame_is_found_in_any_order(name):
    kind, codec, options = KINDS[name]
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    source = open_video(make_video(40, 25, kind=kind, codec=codec, options=options, pixels=pixels), VideoLimits())
    assert len(source.times) == 40
    order = [0, 7, 7, 8, 30, 39, 12, 11, 24, 23, 0, *np.random.default_rng(0).permutation(40)[:12].tolist()]
    cursor = source.open()
    assert [number_of(cursor.read(i, lambda share: None)) for i in order] == order
    cursor.close()


def test_few_frames_of_a_long_video_decode_few(monkeypatch):
    source = open_video(make_video(600, 25, options={"preset": "ultrafast", "g": "10"}), VideoLimits())
    decoded, cursor = [], source.open()
    step = cursor._decode

    def counted():
        for frame in step():
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(cursor, "_decode", counted)
    assert [number_of(cursor.read(i, lambda share: None)) for i in (55, 250, 251, 599)] == [55, 250, 251, 599]
    cursor.close()
    assert len(decoded) <= 6 + 1 + 1 + 10


def test_read_frames_are_freed():
    """PyAV's own way to the display matrix keeps every frame for ever."""
    pixels = np.zeros((720, 960, 3), np.uint8)
    source, process = (
        open_video(make_video([pixels] * 80, options={"preset": "ultrafast"}), VideoLimits()),
        psutil.Process(),
    )
    cursor, before = source.open(), 0
    for i in range(80):
        cursor.read(i, lambda share: None)
        if i == 20:
            before = process.memory_info().rss
    assert process.memory_info().rss - before < 20 << 20, "sixty frames are 62 MB"
    cursor.close()


def test_indexing_and_reading_can_be_stopped():
    data = make_video(300, 25, options={"preset": "ultrafast", "g": "300"})

    class StopError(Exception):
        pass

    calls = []

    def watch(share):
        calls.append(share)
        if len(calls) == 20:
            raise StopError

    with pytest.raises(StopError):
        open_video(data, VideoLimits(), watch)
    assert len(calls) == 20
    assert calls == sorted(calls)
    cursor = open_video(data, VideoLimits()).open()
    calls.clear()
    with pytest.raises(StopError):
        cursor.read(299, watch)
    cursor.close()


# --- as they should look ------------------------------------------------------------------------------------------

QUARTERS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (30, 40, 200), "grey": (128, 128, 128)}


def quarters(width: int = 96, height: int = 64) -> np.ndarray:
    """Red, green / blue, grey."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for i, colour in enumerate(QUARTERS.values()):
        rows, cols = slice(i // 2 * height // 2, (i // 2 + 1) * height // 2), slice(i % 2 * width // 2, None)
        pixels[rows, cols] = colour
    return pixels


def first(data: bytes) -> np.ndarray:
    found = open_video(data, VideoLimits())
    cursor = found.open()
    picture = cursor.read(0, lambda share: None)
    cursor.close()
    assert picture.size == found.size
    return np.asarray(picture)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_rotated_video_is_turned_upright(degrees):
    data = make_video([quarters()] * 3, prepare=lambda stream: stream.set_display_rotation(degrees))
    turned = np.rot90(quarters(), degrees // 90)  # both counter-clockwise
    assert first(data).shape == turned.shape
    assert np.abs(first(data).astype(int) - turned).mean() < 4


def test_a_mirrored_video_is_mirrored():
    data = make_video([quarters()] * 3, prepare=lambda stream: stream.set_display_rotation(0, hflip=True))
    assert np.abs(first(data).astype(int) - quarters()[:, ::-1]).mean() < 4


@pytest.mark.parametrize(
    "codec, pixels, options",
    [
        ("libx264", "yuv420p10le", {}),
        ("libx265", "yuv422p10le", {"x265-params": "log-level=none:pools=1:bframes=0"}),
        ("libx264", "yuv444p", {}),
    ],
)
def test_10_bits_and_other_samplings_have_the_right_colours(codec, pixels, options):
    found = first(make_video([quarters()] * 2, codec=codec, pixels=pixels, options=options))
    assert np.abs(found.astype(int) - quarters()).mean() < 4


def test_the_colours_that_a_file_names_are_used():
    def prepare(stream):
        stream.codec_context.colorspace = 1  # BT.709
        stream.codec_context.color_range = 1

    frame = av.VideoFrame.from_ndarray(quarters(), format="rgb24")
    yuv = frame.reformat(format="yuv444p", dst_colorspace="ITU709", dst_color_range="MPEG")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv444p"
        prepare(stream)
        yuv.pts = 0
        container.mux(stream.encode(yuv))
        container.mux(stream.encode())
    assert np.abs(first(out.getvalue()).astype(int) - quarters()).mean() < 3


# --- without PyAV -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_have_their_own_times(kind):
    source = open_video(make_animation(6, kind, [100, 200, 300, 100, 200, 300]), VideoLimits())
    assert np.allclose(source.times, [0, 0.1, 0.3, 0.6, 0.7, 0.9])
    assert source.rate == pytest.approx(6 / 1.2)
    cursor = source.open()
    assert [number_of(cursor.read(i, lambda share: None)) for i in (0, 3, 5, 1)] == [0, 3, 5, 1]
    cursor.close()
    found = chosen(make_animation(12, kind, 100))
    assert found.choice.indices == shown(found) == recipe(12, 10.0)[0]


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    folder = write_frames(tmp_path / "frames", [numbered(i) for i in range(12)])
    (folder / "notes.txt").write_text("no picture")
    found = chosen(folder)
    assert shown(found) == [*range(12)]
    assert [t for group in found.times_s for t in group] == [*range(12)]
    assert chosen(folder, fps=4).times_s[-1][-1] == 11 / 4
    assert len(chosen(folder, fps=4).choice.indices) == 12
    assert shown(chosen(folder, max_frames=4, packing=1)) == [1, 4, 7, 10]
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no pictures")


def test_a_list_of_pictures_is_a_video(tmp_path):
    folder = write_frames(tmp_path / "frames", [numbered(i) for i in range(2)])
    mixed = [folder / "frame0.png", (folder / "frame1.png").read_bytes(), Image.fromarray(numbered(2))]
    found = chosen(mixed)
    assert shown(found) == [0, 1, 2]
    assert len({found.source.identity(i) for i in range(3)}) == 3
    refused([], "at least one picture")
    with pytest.raises(ImageError, match="of type ndarray"):
        chosen([numbered(0)])
    refused([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], "scale all frames to one size")
    (folder / "frame0.png").write_bytes((folder / "frame1.png").read_bytes())
    assert found.source.identity(0) != open_video(mixed, VideoLimits()).identity(0)
    with pytest.raises(VideoError, match="has changed"):
        shown(found)


def test_none_of_this_is_imported_before_it_is_needed():
    code = "import sys, edge_runtime.model; assert 'av' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env=os.environ | {"PYTHONPATH": ".:kernels"},
        cwd=Path(__file__).parents[3],
    )
