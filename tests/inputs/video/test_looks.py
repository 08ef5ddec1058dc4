"""How frames look: HDR, non-square pixels, transparency, recordings of few frames, dumps of JPEGs, animated AVIF."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from edge_runtime import VideoError
from edge_runtime.inputs.clips import choose
from edge_runtime.inputs.messages import VideoPart
from edge_runtime.inputs.video.frame_choice import VideoLimits, VideoOptions
from edge_runtime.inputs.video.frame_source import facts_of
from edge_runtime.inputs.video.open import open_video
from edge_runtime.inputs.video.tone_mapping import HLG, PQ, to_sdr
from support.video_maker import SIZE, make_video, number_of, numbered

UNLIMITED = VideoLimits()
GREY = (64, 96)  # height, width


def frames_of(source, limits=UNLIMITED):
    """The source, and all of its frames."""
    found = open_video(source, limits)
    cursor = found.open()
    try:
        return found, [cursor.read(i, lambda share: None) for i in range(len(found.times))]
    finally:
        cursor.close()


def encode(pictures, form, *, source="rgb48le", codec="ffv1", pixels="yuv444p10le", kind="matroska", prepare=None):
    """A file of frames whose samples are stored as they are."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], pixels
        for name, value in form.items():
            setattr(stream.codec_context, name, value)
        if codec == "libvpx":
            stream.options = {"auto-alt-ref": "0"}  # it has no alpha otherwise
        if prepare is not None:
            prepare(stream)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format=source)
            if pixels != source:
                frame = frame.reformat(format=pixels, dst_colorspace=form.get("colorspace"))
            for name, value in form.items():
                setattr(frame, name, value)
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def grey(share):
    return np.full((*GREY, 3), round(share * 65535), np.uint16)


HDR = {"color_trc": PQ, "color_primaries": 9, "colorspace": 9, "color_range": 1}


def pq(nits):
    """PQ's signal for a light, implemented again from ST 2084."""
    y = (nits / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


# --- HDR ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve, code", [(PQ, pq(203)), (HLG, 0.75)], ids=["PQ", "HLG"])
def test_a_white_page_in_hdr_is_nearly_white_and_black_is_black(curve, code):
    """203 cd/m² is the white of paper (BT.2408): 75 % of HLG's signal, 58 % of PQ's; stored samples would be grey."""
    found, (page, black) = frames_of(encode([grey(code), grey(0)], HDR | {"color_trc": curve}))
    assert 222 <= np.asarray(page).mean() <= 240
    assert np.asarray(black).max() <= 2
    assert facts_of(found)["tone_mapped"] == {PQ: "PQ", HLG: "HLG"}[curve]
    assert page.mode == "RGB"


def test_pictures_of_an_ordinary_screen_keep_what_they_have():
    """Dark and middle tones are not dimmed: light that fits below the knee comes out as BT.1886 has it."""
    for nits in (1, 5, 20, 50):
        wanted = (nits / 203) ** (1 / 2.4) * 255
        codes = np.full((1, 1, 3), round(pq(nits) * 65535), np.uint16)
        assert to_sdr(codes, PQ)[0, 0] == pytest.approx([wanted] * 3, abs=3)


@pytest.mark.parametrize("curve", [PQ, HLG])
def test_tone_mapping_rises_with_the_light_and_keeps_greys_grey(curve):
    ramp = np.repeat(np.linspace(0, 65535, 2000).astype(np.uint16)[None, :, None], 3, axis=2)
    found = to_sdr(ramp, curve).astype(int)
    assert (np.diff(found[0, :, 0]) >= 0).all()
    assert np.ptp(found, axis=2).max() <= 1
    assert found[0, 0, 0] == 0
    assert found[0, -1, 0] == 255


def test_a_saturated_hdr_colour_keeps_its_hue():
    red = np.zeros((1, 1, 3), np.uint16)
    red[..., 0] = round(pq(600) * 65535)
    r, g, b = to_sdr(red, PQ)[0, 0].astype(int)
    assert r > 200
    assert max(g, b) < 20


def test_a_dim_master_is_not_rolled_off_as_a_bright_one():
    codes = np.full((1, 1, 3), round(pq(203) * 65535), np.uint16)
    assert to_sdr(codes, PQ, 250)[0, 0, 0] > to_sdr(codes, PQ, 1000)[0, 0, 0] > to_sdr(codes, PQ, 10000)[0, 0, 0]


def test_ten_bits_alone_are_not_hdr():
    found, (picture,) = frames_of(encode([grey(0.5)], {"color_trc": 1, "color_range": 1}))
    assert facts_of(found)["tone_mapped"] is None
    assert np.asarray(picture).mean() == pytest.approx(127.5, abs=2)


# --- oblong pixels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "aspect, size",
    [
        (Fraction(4, 3), (64, 48)),  # 1440 x 1080 of HDV
        (Fraction(16, 15), (51, 48)),  # PAL
        (Fraction(8, 9), (48, 54)),  # NTSC: rows are kept, columns too
        (Fraction(2, 1), (96, 48)),
        (Fraction(1, 2), (48, 96)),
        (Fraction(1, 1), (48, 48)),
    ],
)
@pytest.mark.parametrize(
    "kind, codec", [("mp4", "libx264"), ("matroska", "libx264"), ("mov", "mjpeg"), ("avi", "libx264")]
)
def test_oblong_pixels_are_squared(aspect, size, kind, codec):
    def prepare(stream):
        stream.codec_context.sample_aspect_ratio = aspect

    pictures = [numbered(5)[:, :48]] * 2
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    found, frames = frames_of(make_video(pictures, kind=kind, codec=codec, pixels=pixels, prepare=prepare))
    assert found.size == frames[1].size == size
    assert facts_of(found)["pixel_aspect"] == (None if aspect == 1 else [aspect.numerator, aspect.denominator])


def test_squared_frames_count_against_the_limit_of_pixels():
    def prepare(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(10, 1)

    data = make_video(1, prepare=prepare)
    limit = VideoLimits(most_pixels=5 * SIZE[0] * SIZE[1])
    with pytest.raises(VideoError, match=r"frames of 640 x 48"):
        open_video(data, limit)
    assert open_video(data, UNLIMITED).size == (640, 48)


def test_pixels_of_an_impossible_shape_are_refused():
    def prepare(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(20, 1)

    with pytest.raises(VideoError, match="20 by 1"):
        open_video(make_video(1, prepare=prepare), UNLIMITED)


# --- transparency -------------------------------------------------------------------------------------------------


def on_nothing():
    """Black letters would stand here: the left half opaque black, the right half transparent black."""
    pixels = np.zeros((*GREY, 4), np.uint8)
    pixels[:, : GREY[1] // 2, 3] = 255
    return pixels


@pytest.mark.parametrize(
    "kind, codec, pixels",
    [
        ("mov", "qtrle", "argb"),
        ("mov", "png", "rgba"),
        ("mov", "prores_ks", "yuva444p10le"),
        ("matroska", "ffv1", "yuva420p"),
        ("webm", "libvpx-vp9", "yuva420p"),
        ("webm", "libvpx", "yuva420p"),
    ],
)
def test_transparency_is_composed_onto_white(kind, codec, pixels):
    data = encode([on_nothing()] * 3, {}, source="rgba", codec=codec, pixels=pixels, kind=kind)
    _, frames = frames_of(data)
    for frame in frames:
        seen = np.asarray(frame).astype(int)
        assert seen[:, : GREY[1] // 2 - 8].max() < 40, f"{codec}: what is opaque"
        assert seen[:, GREY[1] // 2 + 8 :].min() > 215, f"{codec}: what is transparent"


def test_transparent_frames_are_found_by_seeking_too():
    pictures = [np.dstack([numbered(i), numbered(i)[..., 0]]) for i in range(12)]  # white, and nothing
    data = encode(pictures, {}, source="rgba", codec="libvpx-vp9", pixels="yuva420p", kind="webm")
    found = open_video(data, UNLIMITED)
    cursor = found.open()
    for i in (11, 3, 7, 0):
        assert np.asarray(cursor.read(i, lambda share: None)).min() > 200
    cursor.close()


# --- recordings of few frames -------------------------------------------------------------------------------------


@pytest.mark.parametrize("every_s", [2, 2.5, 5, 30, 600])
@pytest.mark.parametrize("n_frames", [1, 2, 8, 20])
def test_a_slow_recording_gives_every_frame_once(every_s, n_frames):
    found = VideoOptions().choose(n_frames, 1 / every_s)
    assert found.indices == [*range(n_frames)]
    assert [len(group) for group in found.temporal_ids] == [1] * n_frames


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5, 0.7, 1, 1.4, 1.6, 2, 2.5, 3, 25])
@pytest.mark.parametrize(
    "options", [{}, {"fps": 0.1}, {"fps": 5}, {"max_frames": 4}, {"max_frames": 4, "packing": 2}]
)
def test_no_frame_is_used_twice(rate, options):
    for n_frames in (1, 2, 3, 7, 60, 400):
        found = VideoOptions(**options).choose(n_frames, rate)
        assert len(set(found.indices)) == len(found.indices) >= 1
        assert sum(map(len, found.temporal_ids)) == len(found.indices)
        assert found.indices[-1] < n_frames


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.5, 1, 1.4, 1.5, 2, 2.5, 10, 29.97])
def test_already_chosen_frames_are_all_used(rate):
    frames = [Image.new("RGB", (64, 64), (i * 20, 0, 0)) for i in range(10)]
    found = choose(VideoPart(frames, VideoOptions(fps=rate)), UNLIMITED)
    assert found.choice.indices == [*range(10)]


def test_slow_files_are_chosen_from_as_their_times_say():
    data = make_video(8, 25, times=lambda i: 125 * i)
    found = choose(VideoPart(data, VideoOptions()), UNLIMITED)
    assert found.choice.indices == [*range(8)]
    assert [time for group in found.times_s for time in group] == pytest.approx([5.0 * i for i in range(8)], abs=0.01)


# --- kinds of files -----------------------------------------------------------------------------------------------


def jpegs(count):
    for i in range(count):
        out = io.BytesIO()
        Image.fromarray(numbered(i)).save(out, "JPEG", quality=95)
        yield out.getvalue()


def multipart(boundary=b"frame"):
    head = b"--%s\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n"
    return b"".join(head % (boundary, len(data), data) for data in jpegs(6))


@pytest.mark.parametrize("data", [b"".join(jpegs(6)), multipart(), b"\r\n" + multipart(b"--myboundary")])
def test_dumps_of_jpegs_are_videos(data):
    _, frames = frames_of(data)
    assert [number_of(frame) for frame in frames] == [*range(6)]


def test_an_animated_avif_is_a_video():
    out = io.BytesIO()
    first, *rest = (Image.fromarray(numbered(i)) for i in range(5))
    first.save(out, "AVIF", save_all=True, append_images=rest, duration=200, quality=95)
    found, frames = frames_of(out.getvalue())
    assert [number_of(frame) for frame in frames] == [*range(5)]
    assert found.rate == pytest.approx(5)


# --- fingerprints -------------------------------------------------------------------------------------------------


def palette_picture(colours):
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4, "P")
    picture.putpalette([c for colour in colours for c in colour])
    return picture


def turned(orientation):
    picture = Image.fromarray(numbered(77)[:48, :48])
    picture.getexif()[0x0112] = orientation
    return picture


def as_file(picture, **options):
    out = io.BytesIO()
    picture.save(out, "PNG", **options)
    out.seek(0)
    return out


PAIRS = {
    "palette": (
        palette_picture([(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]),
        palette_picture([(0, 0, 0), (20, 20, 20), (250, 250, 0), (9, 9, 9)]),
    ),
    "orientation": (turned(1), turned(3)),
    "open files": (as_file(Image.new("RGB", (64, 64), "red")), as_file(Image.new("RGB", (64, 64), "blue"))),
    "bytes": (
        as_file(Image.new("RGB", (64, 64), "red")).getvalue(),
        as_file(Image.new("RGB", (64, 64), "blue")).getvalue(),
    ),
    "samples": (Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), (254, 0, 0))),
    "size": (Image.new("RGB", (64, 32), "red"), Image.new("RGB", (32, 64), "red")),
    "grey in 16 bits": (
        Image.fromarray(np.full((64, 64), 1000, np.uint16)),
        Image.fromarray(np.full((64, 64), 60000, np.uint16)),
    ),
}


@pytest.mark.parametrize("one, other", PAIRS.values(), ids=PAIRS)
def test_frames_that_look_different_have_different_fingerprints(one, other):
    sources = [open_video([picture], UNLIMITED) for picture in (one, other)]
    for source in sources:
        assert source.identity(0) == source.identity(0)
        source.open().read(0, lambda share: None)  # of what is read, the same
    assert sources[0].identity(0) != sources[1].identity(0)


def test_equal_pictures_have_equal_fingerprints_whatever_file_object_they_are_in():
    red = Image.new("RGB", (64, 64), "red")
    assert open_video([as_file(red)], UNLIMITED).identity(0) == open_video([as_file(red)], UNLIMITED).identity(0)
