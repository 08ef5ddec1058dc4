"""Damage that does not affect pixels is tolerated: metadata, a missing end. Missing rows are reported."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_runtime.errors import ImageError
from edge_runtime.inputs.image import EXIF_ORIENTATION, load_image, picture_size
from support.document_maker import pages_tiff

SIZE = (96, 64)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
WORD = Image.new("RGB", SIZE, "ivory")
WORD.paste(NOISE.crop((0, 0, 40, 20)), (20, 8))  # flat at its end, as pages are
PICTURES = {"noise": NOISE, "flat below": WORD, "grey": NOISE.convert("L"), "CMYK": NOISE.convert("CMYK")}
WAYS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True},
    "4:4:4": {"subsampling": 0},
    "restarts": {"restart_marker_rows": 1},
}


def encoded(picture: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    if kind == "HEIF":
        import pillow_heif

        pillow_heif.register_heif_opener()
    out = io.BytesIO()
    picture.copy().save(out, kind, **options)  # a copy: Pillow leaves one format's settings on it for the next
    return out.getvalue()


def same(data: bytes, whole: bytes) -> None:
    assert np.array_equal(np.asarray(load_image(data)), np.asarray(load_image(whole)))
    assert picture_size(data) == picture_size(whole)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", PICTURES)
def test_a_jpeg_without_its_end_marker(what: str, way: str) -> None:
    data = encoded(PICTURES[what], **WAYS[way])
    official = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(np.asarray(load_image(data)), official)
    bare = data[:-2]
    for end in (
        b"",
        b"\xff",
        b"\0\0",
        bytes(700),
        b"\xff\xd9" + bytes(700),
        b"\xff\xd9" + b"notes of a camera" * 400,
    ):
        same(bare + end, data)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["noise", "grey", "CMYK"])
def test_a_jpeg_with_rows_missing(what: str, way: str) -> None:
    """Also if the rest is zeros, or an end marker follows the cut, which Pillow accepts with grey rows."""
    data = encoded(PICTURES[what], **WAYS[way])
    for share in (0.5, 0.8, 0.95):
        cut = data[: int(len(data) * share)]
        ends = [b"", bytes(len(data) - len(cut))] + [b"\xff\xd9"] * (way != "progressive")
        for end in ends:
            with pytest.raises(ImageError, match=r"cannot be decoded .*truncated.*cut short"):
                load_image(cut + end)


def test_scans_that_are_missing_are_missing() -> None:
    """Without its last scans a progressive JPEG has all rows, but not their details."""
    data = encoded(WORD, progressive=True)
    for place in [i for i in range(len(data)) if data.startswith(b"\xff\xda", i)][1:]:
        with pytest.raises(ImageError, match="truncated"):
            load_image(data[:place])


def test_pictures_in_one_jpeg_file() -> None:
    data = encoded(NOISE, "MPO", save_all=True, append_images=[WORD])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    for cut in (data[:-2], data[:-400], data + bytes(99)):
        same(cut, data)
    with pytest.raises(ImageError, match="truncated"):
        load_image(data[: len(data) // 3])


def test_intentional_grey() -> None:
    """The colour of missing rows is no proof that rows are missing."""
    grey = NOISE.copy()
    grey.paste((128, 128, 128), (0, 32, 96, 64))
    data = encoded(grey, quality=95)
    assert np.array_equal(np.asarray(load_image(data)), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("n", range(1, 20))
def test_png_without_its_end(n: int) -> None:
    data = encoded(NOISE, "PNG")
    same(data[:-n], data)
    if n <= 16:  # before it stands the check sum of the pixels
        same(data[:-n] + bytes(n), data)


def test_gif_without_its_end() -> None:
    data = encoded(NOISE.quantize(64), "GIF")
    for n in (1, 2):
        same(data[:-n], data)
    for n in (20, 500):
        with pytest.raises(ImageError, match="truncated"):
            load_image(data[:-n])


def test_webp_without_padding_or_with_more() -> None:
    data = next(
        found
        for width in range(30, 60)
        if int.from_bytes((found := encoded(NOISE.crop((0, 0, width, 40)), "WEBP", lossless=True))[16:20], "little")
        % 2
    )
    for other in (data[:-1], data + b"\0", data + b"garbage" * 9):
        same(other, data)
    for n in (3, 200, len(data) // 2):
        with pytest.raises(ImageError):
            load_image(data[:-n])


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "TGA"])
def test_formats_whose_last_bytes_are_pixels(kind: str) -> None:
    data = encoded(NOISE, kind)
    same(data + b"garbage" * 9, data)
    if kind != "TGA":  # has a footer
        with pytest.raises(ImageError, match="truncated"):
            load_image(data[:-2])
    with pytest.raises(ImageError, match="truncated"):
        load_image(data[:-3000])


# --- notes ------------------------------------------------------------------------------------------------------

TAG = b"II*\0\x08\0\0\0\x01\0\x12\x01"  # the beginning of a directory with one entry: orientation
DAMAGED_EXIF = {
    "no TIFF header": b"garbage!",
    "a header alone": b"II*\0",
    "cut short": b"II*\0\x08\0\0\0\x05\0\x12\x01",
    "a place behind the end": b"II*\0\xff\xff\xff\x7f",
    "Motorola and garbage": b"MM\0*\0\0\0\x08" + b"\xff" * 40,
    "text": TAG + b"\x02\0\x02\0\0\x006\0\0\0\0\0\0\0",
    "no values": TAG + b"\x03\0\0\0\0\0\x06\0\0\0\0\0\0\0",
    "two billion values": TAG + b"\x03\0\xff\xff\xff\x7f\x06\0\0\0\0\0\0\0",
    "a type that is none": TAG + b"\x99\0\x01\0\0\0\x06\0\0\0\0\0\0\0",
    "divided by zero": TAG + b"\x05\0\x01\0\0\0\x1a\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0",
    "99": TAG + b"\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",
    "0": TAG + b"\x03\0\x01\0\0\0\0\0\0\0\0\0\0\0",
    "-1": TAG + b"\x08\0\x01\0\0\0\xff\xff\0\0\0\0\0\0",
}


def png_chunk(name: bytes, data: bytes, crc: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) ^ crc)


def with_exif(kind: str, exif: bytes) -> bytes:
    """A picture of a format with these bytes as its EXIF data, whatever they are."""
    data = encoded(NOISE, kind, **({"quality": 100} if kind in ("AVIF", "HEIF") else {}))
    if kind == "JPEG":
        body = b"Exif\0\0" + exif
        return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
    if kind == "PNG":
        return data[:33] + png_chunk(b"eXIf", exif) + data[33:]
    if kind == "WEBP":
        size = struct.pack("<I", SIZE[0] - 1)[:3] + struct.pack("<I", SIZE[1] - 1)[:3]
        chunk = b"EXIF" + struct.pack("<I", len(exif)) + exif + b"\0" * (len(exif) % 2)
        body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x08\0\0\0" + size + data[12:] + chunk
        return b"RIFF" + struct.pack("<I", len(body)) + body
    # HEIC and AVIF: made with sound EXIF data, which are then overwritten.
    sound = Image.Exif()
    sound[0x010F] = "x" * 200
    data = encoded(NOISE, kind, quality=100, exif=sound.tobytes())
    place = data.find(b"MM\0*")
    assert place > 0
    return data[:place] + exif.ljust(200, b"\0") + data[place + 200 :]


@pytest.mark.parametrize("damage", DAMAGED_EXIF)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "HEIF"])
def test_damaged_exif_costs_the_orientation(kind: str, damage: str) -> None:
    data = with_exif(kind, DAMAGED_EXIF[damage])
    found = load_image(data)
    assert found.size == picture_size(data) == SIZE
    bare = encoded(NOISE, kind, **({"quality": 100} if kind in ("AVIF", "HEIF") else {}))
    assert np.array_equal(np.asarray(found), np.asarray(load_image(bare)))


@pytest.mark.parametrize(
    "value",
    [
        *(struct.pack("<HIHH", 3, 1, number, 0) for number in (0, 9, 99, 65535)),
        struct.pack("<HI4s", 2, 2, b"6\0"),
        struct.pack("<HIHH", 3, 2, 6, 6),
        struct.pack("<HII", 5, 1, 8),  # a fraction that is read from the header
        struct.pack("<HII", 3, 1 << 30, 8),
    ],
)
def test_odd_orientations_of_a_tiff(value: bytes) -> None:
    """Text and invalid numbers change nothing; of several values the first counts."""
    data = encoded(NOISE, "TIFF", tiffinfo={EXIF_ORIENTATION: 1})
    entry = struct.pack("<HHIHH", EXIF_ORIENTATION, 3, 1, 1, 0)
    assert data.count(entry) == 1
    data = data.replace(entry, struct.pack("<H", EXIF_ORIENTATION) + value)
    expected = SIZE[::-1] if value.endswith(b"\6\0\6\0") else SIZE
    assert load_image(data).size == picture_size(data) == expected


NOTES = {
    "iCCP": [png_chunk(b"iCCP", b"sRGB\0\0garbage"), png_chunk(b"iCCP", b"", 1), png_chunk(b"iCCP", b"x" * 50, 1)],
    "text": [
        png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000))[:150_000]),
        png_chunk(b"tEXt", b"no zero in it", 7),
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta", 3),
    ],
    "numbers": [png_chunk(b"gAMA", b"", 0), png_chunk(b"cHRM", b"abc", 1), png_chunk(b"pHYs", b"\0", 2)],
    "time": [png_chunk(b"tIME", b"\0" * 7, 5), png_chunk(b"prVW", b"?" * 20, 5)],
}


@pytest.mark.parametrize("kind", NOTES)
def test_damaged_metadata_chunks_of_a_png(kind: str) -> None:
    data = encoded(NOISE, "PNG")
    for note in NOTES[kind]:
        same(data[:33] + note + data[33:], data)
    with pytest.raises(ImageError):
        load_image(data[:33].replace(b"IHDR", b"IHDX") + data[33:])


def test_damaged_metadata_segments_of_a_jpeg() -> None:
    data = encoded(NOISE)
    for kind, body in [
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation='?'"),
        (0xE2, b"ICC_PROFILE\0\x07\x03garbage"),
        (0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
        (0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff\xff"),
        (0xEE, b"Adobe"),
        (0xFE, b"\xff\xfe\xfd"),
    ]:
        segment = b"\xff" + bytes([kind]) + struct.pack(">H", len(body) + 2) + body
        same(data[:2] + segment + data[2:], data)


def test_damaged_profile_of_a_webp() -> None:
    data = encoded(NOISE, "WEBP", lossless=True, icc_profile=b"garbage", xmp=b"<x:xmpmeta tiff:Orientation=")
    same(data, encoded(NOISE, "WEBP", lossless=True))


# --- what libraries write ----------------------------------------------------------------------------------------

QUIET = """
import sys
from pathlib import Path
from edge_runtime.inputs.documents import DocumentOptions, with_pages
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.inputs.image import load_image
from edge_runtime.inputs.messages import parse_messages
from edge_runtime.prompt.build import iter_images
from support.document_maker import SLICING
for path in sys.argv[1:]:
    try:
        messages = parse_messages([{"role": "user", "content": [Path(path)]}])
        for part in iter_images(with_pages(messages, DocumentOptions(), SLICING)):
            load_image(part.source)
    except EdgeRuntimeError as error:
        print(error)
    else:
        print("read")
"""


def test_no_library_writes_to_stderr(tmp_path: Path) -> None:
    """libtiff, libjpeg, libwebp, libheif, pdfium and Pillow's warnings, each with files that make it complain."""
    generator = np.random.default_rng(7)
    made: list[bytes] = []
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits", "group4", "zstd"):
        picture = NOISE.convert("1") if compression == "group4" else NOISE
        data = encoded(picture, "TIFF", compression=compression)
        made += [
            data[:-4],
            data[: len(data) // 2],
            data.replace(struct.pack("<HHI", 259, 3, 1), b"\x03\1\3\0\2\0\0\0"),
        ]
        for _ in range(4):
            damaged = bytearray(data)
            for place in generator.integers(8, len(data), 12):
                damaged[place] = generator.integers(256)
            made.append(bytes(damaged))
    for kind in ("JPEG", "WEBP", "HEIF", "AVIF", "PNG", "GIF", "JPEG2000"):
        data = encoded(NOISE, kind)
        made += [data[: len(data) // 2], data[:-9], data[:60] + bytes(40) + data[100:]]
    made.append(pages_tiff([NOISE.copy(), WORD.copy()])[:-2000])
    form = b"/AcroForm<</XFA 9 0 R/Fields[]>>"
    made.append(b"%PDF-1.7\n1 0 obj<</Type/Catalog/Pages 2 0 R" + form + b">>endobj\ntrailer<</Root 1 0 R>>")
    paths = []
    for number, data in enumerate(made):
        paths.append(tmp_path / f"{number}.bin")
        paths[-1].write_bytes(data)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[1])])}
    found = subprocess.run(
        [sys.executable, "-c", QUIET, *map(str, paths)], capture_output=True, text=True, env=env, timeout=300
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    lines = found.stdout.splitlines()
    assert len(lines) == len(paths)
    assert sum(line != "read" for line in lines) > len(lines) // 3
