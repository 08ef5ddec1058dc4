"""Untrusted files in worker processes: the same pixels as in this process, within limits, whatever the files do."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_runtime.errors import EdgeRuntimeError, ImageError, VideoError
from edge_runtime.inputs.clips import expand_videos
from edge_runtime.inputs.documents import DocumentOptions, with_pages
from edge_runtime.inputs.messages import parse_messages
from edge_runtime.inputs.opener import InThisProcess, cut_source
from edge_runtime.inputs.slice_groups import LazyGroup
from edge_runtime.inputs.video.frame_choice import VideoLimits
from edge_runtime.inputs.workers.opener import WorkerOpener
from edge_runtime.inputs.workers.pool import DecoderPool
from edge_runtime.pipeline import group_digest
from edge_runtime.prompt.build import iter_images
from support.document_maker import COLOURS, SLICING, blocks, coloured_pdf, pages_tiff, words_pdf
from support.video_maker import make_video, numbered

LIMITS = VideoLimits(most_pixels=1_000_000)


@pytest.fixture(scope="module")
def pool():
    pool = DecoderPool(2, 60.0)
    yield pool
    pool.close()


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8))


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(noise(300, 200), "JPEG", exif=exif)


def animation() -> bytes:
    frames = [Image.fromarray(numbered(i)) for i in range(6)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=200)


def pictures(opener, content, **options) -> list:
    """Sizes and slices of all pictures of a message; for videos, digests and pixels of their groups."""
    options = {"pages": None, "pixel_limit": 4_000_000, **options}
    limit = options.pop("pixel_limit")
    limits = replace(LIMITS, most_pixels=options.pop("video_pixels", LIMITS.most_pixels))
    conversation = with_pages(
        parse_messages([{"role": "user", "content": content}]),
        DocumentOptions(**options),
        SLICING,
        open_part=opener.part,
    )
    found = []
    for part in iter_images(expand_videos(conversation, SLICING, limits, lambda share: None, opener.video)):
        if not hasattr(part, "clip"):
            found.append(cut_source(part.source, limit, SLICING, part.max_slices))
        elif part.ids:
            for group in part.clip.group(part.number):
                assert isinstance(group, LazyGroup)
                found.append((group_digest(group), [item.pixels for item, _ in group.load()]))
                group.release()
    return found


CONTENTS = {
    "a picture": [{"type": "image", "image": saved(noise(700, 500), "PNG")}],
    "turned": [{"type": "image", "image": turned(6)}],
    "16 bits": [{"type": "image", "image": saved(noise(80, 60).convert("I;16"), "PNG")}],
    "transparent": [{"type": "image", "image": saved(noise(80, 60).convert("RGBA"), "WEBP", lossless=True)}],
    "several": [{"type": "image", "image": saved(noise(90 + i, 60), "BMP")} for i in range(3)],
    "a Pillow picture": [{"type": "image", "image": noise(50, 40)}],
    "an open file": [{"type": "image", "image": io.BytesIO(turned(3))}],
    "a PDF": [{"type": "pdf", "pdf": coloured_pdf(COLOURS), "pages": "2-"}],
    "a locked PDF": [{"type": "pdf", "pdf": words_pdf(["A"], encrypt="open"), "password": "open", "dpi": 50}],
    "a TIFF of pages": [{"type": "image", "image": pages_tiff(blocks([(40, 30), (60, 20), (10, 90)]))}],
    "an animation": [{"type": "video", "video": animation(), "packing": 2}],
    "a video": [{"type": "video", "video": make_video(30), "fps": 10, "packing": 3, "max_slices": 2}],
    "a video without times": [{"type": "video", "video": make_video(12, kind="h264"), "packing": 2}],
    "frames": [
        {"type": "video", "video": [saved(Image.fromarray(numbered(i)), "PNG") for i in range(4)], "packing": 2}
    ],
}


def assert_equal(one, other) -> None:
    assert len(one) == len(other) > 0
    for (key, pixels), (key_there, there) in zip(one, other, strict=True):
        assert key == key_there
        assert len(pixels) == len(there)
        for a, b in zip(pixels, there, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_pixels_and_fingerprints_are_those_of_this_process(pool, content):
    with WorkerOpener(pool, lambda: None) as opener:
        there = pictures(opener, content)
    assert_equal(pictures(InThisProcess(), content), there)


def test_paths_are_read_here_and_named(pool, tmp_path):
    path, text = tmp_path / "a.png", tmp_path / "b.png"
    path.write_bytes(saved(noise(90, 50), "PNG"))
    text.write_text("no picture")
    with WorkerOpener(pool, lambda: None) as opener:
        assert_equal(pictures(InThisProcess(), [path]), pictures(opener, [path]))
        for bad in (text, tmp_path / "none.png", tmp_path):
            with pytest.raises(ImageError) as there:
                pictures(opener, [bad])
            with pytest.raises(ImageError) as here:
                pictures(InThisProcess(), [bad])
            assert str(there.value) == str(here.value)


WRONG = {
    "no picture": [{"type": "image", "image": b"no picture at all"}],
    "cut short": [{"type": "image", "image": saved(noise(300, 300), "PNG")[:-9000]}],
    "too large": [{"type": "image", "image": saved(Image.new("L", (3000, 2000)), "PNG")}],
    "no PDF": [{"type": "pdf", "pdf": b"GIF89a"}],
    "a picture as PDF": [{"type": "pdf", "pdf": saved(noise(3, 3), "PNG")}],
    "no such page": [{"type": "pdf", "pdf": coloured_pdf(COLOURS), "pages": "2-9"}],
    "wrong pages": [{"type": "pdf", "pdf": coloured_pdf(COLOURS), "pages": "a"}],
    "pages of another kind": [{"type": "pdf", "pdf": coloured_pdf(COLOURS), "pages": {1: 2}}],
    "wrong dpi": [{"type": "pdf", "pdf": coloured_pdf(COLOURS), "dpi": -1}],
    "wrong password": [{"type": "pdf", "pdf": words_pdf(["A"], encrypt="open"), "password": "shut"}],
    "no video": [{"type": "video", "video": b"no video at all"}],
    "a cut video": [{"type": "video", "video": make_video(50, header_first=True)[:-2000]}],
    "a large video": [{"type": "video", "video": make_video([np.zeros((1080, 1920, 3), np.uint8)])}],
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_errors_are_those_of_this_process(pool, content):
    with pytest.raises(EdgeRuntimeError) as here:
        pictures(InThisProcess(), content)
    with WorkerOpener(pool, lambda: None) as opener, pytest.raises(EdgeRuntimeError) as there:
        pictures(opener, content)
    assert type(there.value) is type(here.value)
    assert str(there.value) == str(here.value)
    with WorkerOpener(pool, lambda: None) as opener:  # and the next one is served
        pictures(opener, CONTENTS["turned"])


def test_a_damaged_frame_is_reported(pool):
    data = bytearray(make_video(40, options={"g": "10"}, header_first=True))
    place = data.index(b"mdat")
    for i in range(place + 40, len(data) - 200, 7):
        data[i] ^= 0x55
    content = [{"type": "video", "video": bytes(data), "fps": 25}]
    with pytest.raises(VideoError) as here:
        pictures(InThisProcess(), content)
    with WorkerOpener(pool, lambda: None) as opener, pytest.raises(VideoError) as there:
        pictures(opener, content)
    assert str(there.value) == str(here.value)


def test_an_answer_is_the_same(demo, pool):
    """From messages to the answer, with the option of `Model.chat`."""
    page = Image.open(Path(__file__).parents[3] / "examples" / "sign.png")
    messages = [{"role": "user", "content": [{"type": "image", "image": saved(page, "PNG")}, "What does it say?"]}]
    here = demo.chat(messages, greedy=True, max_tokens=8)
    there = demo.chat(messages, greedy=True, max_tokens=8, decoders=pool)
    assert there.answer == here.answer
