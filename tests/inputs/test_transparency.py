"""Transparency is composed onto white, in every mode and format with alpha; the rest stays as it is."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_runtime.inputs.image import load_image, picture_size
from edge_runtime.inputs.transparency import on_white
from edge_runtime.inputs.video.frame_choice import VideoLimits
from edge_runtime.inputs.video.open import open_video
from support.document_maker import pictures

Pixels = npt.NDArray[Any]
SHADES = np.add.outer(np.arange(24) * 4, np.arange(32) * 4).astype(np.uint8)
RGB = np.dstack([SHADES, 255 - SHADES, SHADES // 2])
ALPHA = np.full(SHADES.shape, 255, np.uint8)
ALPHA[:, 8:16], ALPHA[:, 16:24] = 128, 0
RGBA = np.dstack([RGB, ALPHA])
CLEAR = ALPHA == 0


def composed(colours: Pixels, alpha: Pixels) -> Pixels:
    share = alpha[..., None] / 255
    return np.rint(colours * share + 255 * (1 - share))  # type: ignore[no-any-return]


def written(picture: Image.Image, kind: str, **options: Any) -> bytes:
    if kind == "HEIF":
        import pillow_heif

        pillow_heif.register_heif_opener()
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def error(source: Any, expected: Pixels) -> int:
    found = load_image(source)
    assert found.mode == "RGB"
    assert picture_size(source) == found.size == expected.shape[1::-1]
    return int(np.abs(np.asarray(found).astype(int) - expected).max())


@pytest.mark.parametrize(
    "kind, bound", [("PNG", 1), ("TIFF", 1), ("WEBP", 1), ("AVIF", 12), ("HEIF", 12), ("TGA", 1)]
)
def test_every_format_with_alpha(kind: str, bound: int) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = written(Image.fromarray(RGBA), kind, **options)
    assert error(data, composed(RGB, ALPHA)) <= bound
    pixels = np.asarray(load_image(data))
    assert (pixels[CLEAR] == 255).all(), "never the colours below what is transparent"


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA", "P"])
def test_pictures_in_memory(mode: str) -> None:
    if mode in ("LA", "La"):
        picture = Image.fromarray(np.dstack([SHADES, ALPHA])).convert(mode)
        expected = composed(np.dstack([SHADES] * 3), ALPHA)
    elif mode in ("PA", "P"):
        palette = Image.fromarray(SHADES // 4, "L").convert("P")
        palette.putpalette([value for i in range(256) for value in (i, 255 - i, i // 2)])
        colours = np.asarray(palette.convert("RGB"))
        if mode == "PA":
            picture = palette.convert("PA")
            picture.putalpha(Image.fromarray(ALPHA))
        else:
            picture = palette
            picture.info["transparency"] = bytes(range(256))
        alpha = ALPHA if mode == "PA" else SHADES // 4
        assert picture.mode == mode
        assert error(picture, composed(colours, alpha)) <= 1
        return
    else:
        picture, expected = Image.fromarray(RGBA).convert(mode), composed(RGB, ALPHA)
    assert picture.mode == mode
    assert error(picture, expected) <= 2
    assert picture.mode == mode, "the caller's picture stays as it is"


@pytest.mark.parametrize("kind, transparency", [("PNG", 1), ("PNG", bytes([255, 0, 128])), ("GIF", 1)])
def test_palettes(kind: str, transparency: Any) -> None:
    indices = (SHADES % 3).astype(np.uint8)
    picture = Image.fromarray(indices, "P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    alphas = np.array([255, 0, 255] if isinstance(transparency, int) else list(transparency), np.uint8)
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])[indices]
    data = written(picture, kind, transparency=transparency)
    assert error(data, composed(colours, alphas[indices])) <= 1


def png(pixels: Pixels, kind: int, depth: int, key: bytes) -> bytes:
    """A PNG with a transparent colour (tRNS); `pixels` are its rows in bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = pixels.shape[0], pixels.shape[1] * 8 // depth // {0: 1, 2: 3}[kind]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"tRNS", key) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_shade_in_every_depth(depth: int) -> None:
    rows = np.arange(256, dtype=np.uint8).reshape(8, 32)
    most = (1 << depth) - 1
    key = most // 2 if depth != 16 else 0x0203
    data = png(rows, 0, depth, struct.pack(">H", key))
    bits = np.unpackbits(rows, axis=1).reshape(8, -1, depth).astype(np.int64)
    samples = bits @ (1 << np.arange(depth)[::-1])
    expected = np.where(samples == key, 255, np.rint(samples * 255 / most))
    assert error(data, np.dstack([expected] * 3)) == 0
    assert (samples == key).any()


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour(depth: int) -> None:
    colours = np.random.default_rng(0).integers(0, 3, (8, 8, 3)) * (1 if depth == 8 else 0x0101)
    colours = colours.astype(">u2")
    key = colours[0, 0]
    assert 1 < (colours == key).all(axis=2).sum() < 64
    rows = colours.astype(np.uint8) if depth == 8 else colours
    data = png(rows.reshape(8, -1).view(np.uint8), 2, depth, key.tobytes())
    expected = np.where((colours == key).all(axis=2)[..., None], 255, colours if depth == 8 else colours >> 8)
    assert error(data, expected) == 0


@pytest.mark.parametrize("mode, shape", [("RGBA", 4), ("LA", 2)])
def test_opaque_pixels_keep_their_bytes(mode: str, shape: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, shape), np.uint8)
    pixels[..., -1] = np.where(pixels[..., -1] > 100, 255, pixels[..., -1])
    picture = Image.fromarray(pixels)
    opaque = pixels[..., -1] == 255
    official = np.asarray(picture.convert("RGB"))
    assert np.array_equal(np.asarray(load_image(picture))[opaque], official[opaque])
    pixels[..., -1] = 255
    assert np.array_equal(np.asarray(load_image(Image.fromarray(pixels))), official)


def test_nothing_but_transparency_is_white_where_alpha_is_meant() -> None:
    clear = Image.fromarray(np.dstack([RGB, np.zeros_like(SHADES)]))
    assert error(written(clear, "PNG"), np.full(RGB.shape, 255)) == 0
    assert error(written(clear, "TGA"), RGB) == 0, "TGA and BMP writers leave the fourth byte at zero"


@pytest.mark.parametrize("extra", [1, 2])
@pytest.mark.parametrize("n_pages", [1, 3])
def test_pages_of_a_tiff(extra: int, n_pages: int) -> None:
    """Associated alpha (ExtraSamples 1: colours are multiplied by it) and unassociated (2)."""
    colours = np.where(ALPHA[..., None] == 0, 0, np.rint(RGB * (ALPHA[..., None] / 255)).astype(int))
    stored = np.dstack([colours, ALPHA]).astype(np.uint8) if extra == 1 else RGBA
    pages = [Image.fromarray(stored) for _ in range(n_pages)]
    data = written(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    tag = struct.pack("<HHI", 338, 3, 1)
    assert data.count(tag + b"\2\0") == n_pages
    found = pictures([data.replace(tag + b"\2\0", tag + struct.pack("<H", extra))])
    assert len(found) == n_pages
    for page in found:
        assert np.abs(np.asarray(page).astype(int) - composed(RGB, ALPHA)).max() <= 2


def test_icons() -> None:
    data = written(Image.fromarray(RGBA).resize((32, 32)), "ICO", sizes=[(32, 32)])
    resized = np.asarray(Image.fromarray(RGBA).resize((32, 32)))
    assert error(data, composed(resized[..., :3], resized[..., 3])) <= 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_frames_of_animations(kind: str) -> None:
    frames = []
    for shift in (0, 5, 10):
        pixels = np.zeros((24, 32, 4), np.uint8)
        pixels[4:12, shift : shift + 8] = (0, 0, 0, 255)
        frames.append(Image.fromarray(pixels))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {"disposal": 1 if kind == "PNG" else 2}
    data = written(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    source = open_video(data, VideoLimits())
    cursor = source.open()
    try:
        for index, shift in enumerate((0, 5, 10)):
            expected = np.full((24, 32, 3), 255)
            expected[4:12, shift : shift + 8] = 0
            assert np.abs(np.asarray(cursor.read(index, lambda share: None)).astype(int) - expected).max() <= 2, index
    finally:
        cursor.close()


def test_a_frame_of_a_video_goes_through_one_function() -> None:
    found = np.asarray(on_white(Image.fromarray(RGBA))).astype(int)
    assert np.abs(found - composed(RGB, ALPHA)).max() <= 1
