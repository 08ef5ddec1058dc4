"""Pictures: odd ones are answered with the right pixels, bad ones are refused with one sentence, everywhere."""

from __future__ import annotations

import base64
import io
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_runtime import Model
from edge_runtime.errors import EdgeRuntimeError, ImageError
from edge_runtime.inputs.image import EXIF_ORIENTATION, load_image
from edge_runtime.inputs.slicing import check_plan, plan_slices
from edge_runtime.weights.config import SlicingConfig
from support.command import refused

Pixels = npt.NDArray[Any]


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds nothing: decoding it fails, reading its header does not."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


# --- answered rightly -------------------------------------------------------------------------------------------


def same_as_pillow(picture: Image.Image, kind: str = "PNG", **options: Any) -> None:
    """Officially a picture is `Image.open(...).convert("RGB")`; ours must be that, to the byte."""
    data = encoded(picture, kind, **options)
    official = Image.open(io.BytesIO(data)).convert("RGB")
    ours = load_image(data)
    assert ours.mode == "RGB"
    assert np.array_equal(np.asarray(ours), np.asarray(official))


@pytest.mark.parametrize("mode, shape", [("RGB", (7, 5, 3)), ("L", (7, 5)), ("RGBA", (7, 5, 4)), ("LA", (7, 5, 2))])
def test_ordinary_modes_are_converted_as_pillow_does(mode: str, shape: tuple[int, ...]) -> None:
    pixels = noise(*shape)
    if mode.endswith("A"):  # what is not opaque is composed onto white: test_transparency
        pixels[..., -1] = 255
    picture = Image.fromarray(pixels)
    assert picture.mode == mode
    same_as_pillow(picture)


def test_one_pixel() -> None:
    ours = load_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3))))
    assert ours.size == (1, 1)
    assert ours.getpixel((0, 0)) == (1, 2, 3)


def test_cmyk_is_converted_as_pillow_does() -> None:
    picture = Image.fromarray(noise(16, 16, 4), "CMYK")
    same_as_pillow(picture, "TIFF")
    same_as_pillow(picture, "JPEG", quality=95)


def test_one_bit_is_black_and_white() -> None:
    bits = noise(9, 11) > 127
    pixels = np.asarray(load_image(encoded(Image.fromarray(bits))))
    assert np.array_equal(pixels, np.repeat(bits[..., None] * np.uint8(255), 3, axis=2))


def test_the_first_frame_of_an_animation_counts() -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(red, kind, save_all=True, append_images=[blue], duration=50, **options)
        assert Image.open(io.BytesIO(data)).n_frames == 2
        assert set(map(tuple, np.asarray(load_image(data)).reshape(-1, 3).tolist())) == {(255, 0, 0)}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF"])
def test_16_bit_grey_is_scaled_to_8_bits(kind: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    if kind == "big-endian TIFF":
        data = big_endian_tiff(values)
        assert Image.open(io.BytesIO(data)).mode == "I;16B"
    else:
        data = encoded(Image.fromarray(values), kind)
    ours = np.asarray(load_image(data))
    assert np.array_equal(ours[..., 0], np.rint(values / 257).astype(np.uint8))
    assert np.array_equal(ours[..., 0], ours[..., 1])
    assert np.array_equal(ours[..., 0], ours[..., 2])


def big_endian_tiff(values: npt.NDArray[np.uint16]) -> bytes:
    """An uncompressed grey TIFF in Motorola order, which Pillow reads but does not write."""
    height, width = values.shape
    tags = [(256, 3, width), (257, 3, height), (258, 3, 16), (259, 3, 1), (262, 3, 1)]
    tags += [(273, 4, 8 + 2 + 8 * 12 + 4), (278, 3, height), (279, 4, values.size * 2)]
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1) + (struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value))
        for tag, kind, value in tags
    )
    return b"MM\0*" + struct.pack(">IH", 8, len(tags)) + entries + b"\0" * 4 + values.astype(">u2").tobytes()


TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(orientation: int) -> None:
    pixels = noise(5, 3, 3)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    expected = TURNS.get(orientation, TURNS[1])(pixels)  # 0 and 9 mean nothing and change nothing
    assert np.array_equal(np.asarray(load_image(encoded(Image.fromarray(pixels), exif=exif))), expected)


def test_a_photo_without_the_tag_takes_the_official_path() -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    same_as_pillow(Image.fromarray(noise(32, 24, 3)), "JPEG", quality=80)
    same_as_pillow(Image.fromarray(noise(32, 24, 3)), "JPEG", quality=80, exif=exif)


@pytest.mark.parametrize("form", ["path", "str", "bytes", "data URI", "Pillow", "Pillow in memory"])
def test_every_form_gives_the_same_pixels(form: str, tmp_path: Path) -> None:
    data = encoded(Image.fromarray(noise(8, 6, 3)))
    path = tmp_path / "grüße picture.png"
    path.write_bytes(data)
    with Image.open(path) as picture:
        sources: dict[str, Any] = {
            "path": path,
            "str": str(path),
            "bytes": data,
            "data URI": "data:image/png;base64," + base64.b64encode(data).decode(),
            "Pillow": picture,
            "Pillow in memory": Image.fromarray(noise(8, 6, 3)),
        }
        assert np.array_equal(np.asarray(load_image(sources[form])), noise(8, 6, 3))


def test_the_pictures_of_the_caller_stay_as_they_are() -> None:
    picture = Image.fromarray(noise(5, 3, 4))
    picture.getexif()[EXIF_ORIENTATION] = 6
    ours = load_image(picture)
    assert ours.size == (5, 3)
    assert picture.size == (3, 5)
    assert picture.mode == "RGBA"
    assert picture.getexif()[EXIF_ORIENTATION] == 6


def test_the_limit_counts_pixels_and_can_be_moved() -> None:
    data = encoded(Image.new("RGB", (20, 10)))
    assert load_image(data, pixel_limit=200).size == (20, 10)
    with pytest.raises(ImageError, match="200 pixels, at most 199"):
        load_image(data, pixel_limit=199)
    with pytest.raises(ImageError, match="20 x 10 = 200 pixels, at most 199"):
        load_image(Image.new("RGB", (20, 10)), pixel_limit=199)
    assert Image.MAX_IMAGE_PIXELS != 199, "Pillow's own guard is put back"


def test_pillow_s_own_lower_limit_does_not_count() -> None:
    """Pillow warns from 89 million pixels on; 200 million are allowed here."""
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(png_header(20_000, 10_000))


def icon(inner: bytes) -> bytes:
    """An icon whose directory says 16 x 16 pixels, with any picture inside."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


def test_pictures_inside_icons_count_against_the_limit() -> None:
    """Their size is in no header of the icon: Pillow's own guard, set to our limit, refuses them."""
    assert load_image(icon(encoded(Image.new("RGBA", (300, 200)))), pixel_limit=60_000).size == (300, 200)
    hollow = icon(png_header(300, 200))  # who decodes it says so
    for limit in (59_999, 20_000):  # over a limit Pillow warns, over twice as much it refuses
        with pytest.raises(ImageError, match=f"has 60000 pixels, at most {limit} are decoded"):
            load_image(hollow, pixel_limit=limit)
    with pytest.raises(ImageError, match="has 400000000 pixels, at most 200000000 are decoded"):
        load_image(icon(png_header(20_000, 20_000)))
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(icon(png_header(20_000, 10_000)))  # the limit itself


# --- refused ----------------------------------------------------------------------------------------------------

JPEG = encoded(Image.fromarray(noise(200, 200, 3)), "JPEG")
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "text named .png": ("note.png", b"This is no picture.\n", "not a picture in a known format"),
    "truncated JPEG": ("cut.jpg", JPEG[: len(JPEG) // 2], "cannot be decoded .*truncated"),
    "JPEG header alone": ("head.jpg", JPEG[:20], "is not a picture|cannot be decoded"),
    "truncated PNG": ("cut.png", encoded(Image.fromarray(noise(200, 200, 3)))[:9000], "cannot be decoded"),
    "damaged PNG": ("bad.png", encoded(Image.fromarray(noise(9, 9, 3))).replace(b"IDAT", b"IDAX"), "picture"),
    "empty file": ("empty.png", b"", "is empty"),
    "random bytes": ("random.webp", noise(5000).tobytes(), "not a picture in a known format"),
    "HEIC without a picture": (
        "photo.heic",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 500,
        "not a picture in a known format|cannot be decoded",
    ),
    "floating point": ("float.tiff", encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "floating-point"),
    "32-bit grey": ("deep.tiff", encoded(Image.new("I", (4, 4), 1 << 20), "TIFF"), "32-bit samples"),
    "400 million pixels": ("bomb.png", png_header(20_000, 20_000), "400000000 pixels, at most 200000000"),
    "a size that overflows": ("bomb.png", png_header(2**31 - 1, 2**31 - 1), "pixels, at most 200000000"),
    "just over the limit": ("over.png", png_header(200_000_001, 1), "200000001 pixels, at most 200000000"),
    "1,000,000 x 1": ("wide.png", encoded(Image.new("L", (1_000_000, 1))), "aspect ratio of 1000000 to 1"),
    "1 x 1,000,000": ("high.png", encoded(Image.new("L", (1, 1_000_000))), "aspect ratio of 1000000 to 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_pictures_are_refused_by_the_library_and_the_command(case: str, tmp_path: Path, demo: Model) -> None:
    name, data, reason = REFUSED[case]
    path = tmp_path / name
    path.write_bytes(data)
    started = time.perf_counter()
    with pytest.raises(ImageError, match=reason):
        demo.slices(path)
    assert time.perf_counter() - started < 2, "refused before anything large is decoded"
    if data:
        with pytest.raises(ImageError, match=reason):
            demo.chat([{"role": "user", "content": [data, "What is it?"]}])
    refused(["run", str(path), "What is it?"], reason)


def test_a_picture_that_is_all_right_is_not_refused(tmp_path: Path, demo: Model) -> None:
    """Without this, the refusals above might all have another cause."""
    path = tmp_path / "good.jpg"
    path.write_bytes(JPEG)
    assert demo.slices(path)


@pytest.mark.parametrize("turned", [False, True])
def test_slices_of_too_many_patches(turned: bool) -> None:
    """With slices of 448 pixels the aspect ratio is refused before (at 14,336 patches); larger ones get here."""
    config = SlicingConfig(1024, 14, 9, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def check(length: int) -> None:
        size = (1, length) if turned else (length, 1)
        check_plan(*size, plan_slices(*size, config), config)

    check(50_000)
    with pytest.raises(ImageError, match=r"one slice would have \d{5} patches, at most 16384"):
        check(900_000)


def test_pictures_so_narrow_that_nothing_is_left(demo: Model) -> None:
    for size in ((300_000, 1), (1, 300_000), (900_000, 20)):
        with pytest.raises(ImageError, match="aspect ratio"):
            demo.slices(Image.new("L", size))
    assert demo.slices(Image.new("L", (2000, 20)))


def test_the_pixel_limit_of_the_command(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    Image.new("RGB", (20, 10)).save(path)
    refused(["run", str(path), "What?", "--max-pixels", "199"], "200 pixels, at most 199 .*--max-pixels")


@pytest.mark.parametrize(
    "name, reason", [("absent.png", "does not exist"), ("http://a.b/c.png", "nothing is fetched")]
)
def test_names_that_are_not_files(name: str, reason: str) -> None:
    refused(["run", name, "What?"], reason)


@pytest.mark.parametrize(
    "source, reason",
    [
        ("absent.png", "does not exist"),
        (Path("absent.png"), "does not exist"),
        ("tests", "is a folder"),
        ("a\0b.png", "null byte"),
        ("n" * 5000, "too long"),
        ("https://example.org/a.png", "web address"),
        (b"", "empty"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,äöü", "not valid base64"),
        ("data:image/png,abc", "not a picture in a known format"),
        ("data:image/png," + "iVBORw0KGgoAAAAN" * 4, "lacks ';base64'"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,aGVsbG8=", "not a picture in a known format"),
        (None, "NoneType"),
        (7, "int"),
    ],
)
def test_sources_that_are_not_pictures(source: Any, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as refusal:
        load_image(source)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


def test_a_lazy_picture_whose_file_is_cut_short() -> None:
    picture = Image.open(io.BytesIO(JPEG[: len(JPEG) // 2]))
    with pytest.raises(ImageError, match="cut short"):
        load_image(picture)


def test_a_lazy_picture_whose_file_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "p.jpg"
    path.write_bytes(JPEG)
    picture = Image.open(path)
    picture.close()
    with pytest.raises(ImageError):
        load_image(picture)


def test_a_message_with_a_bad_picture_leaves_the_model_usable(demo: Model) -> None:
    with pytest.raises(EdgeRuntimeError):
        demo.chat([{"role": "user", "content": [JPEG[:1000], "What?"]}])
    assert demo.chat("Hello", greedy=True, max_tokens=2).completion_tokens


def test_no_program_is_started_for_a_picture(monkeypatch):
    """Pillow runs Ghostscript for EPS, whatever the file's name says."""
    data = io.BytesIO()
    Image.new("RGB", (9, 9)).save(data, "EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **more: pytest.fail("a program was run"))
    with pytest.raises(ImageError, match="PostScript"):
        load_image(data.getvalue())
