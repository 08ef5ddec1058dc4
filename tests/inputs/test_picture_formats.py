"""Formats of pictures, each with a file made here: read as the official code reads them, or refused by name."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_runtime import BackendUnavailable, ImageError
from edge_runtime.inputs import picture_formats as formats
from edge_runtime.inputs.image import EXIF_ORIENTATION, load_image, picture_size
from support.command import refused

SHADES = np.add.outer(np.arange(48) * 2, np.arange(64) * 2).astype(np.uint8)
PIXELS = np.dstack([SHADES, 255 - SHADES, SHADES // 2])
"""Soft shades, which lossy formats keep within a few steps: ndarray [shape=(48, 64, 3), uint8]."""
LOSSY = {"AVIF": 12, "HEIF": 12, "WEBP": 12, "JPEG": 12, "JPEG2000": 0, "PNG": 0, "BMP": 0, "GIF": 60, "TIFF": 0}


def written(kind: str, pixels: Any = PIXELS, **options: Any) -> bytes:
    if kind == "HEIF":
        import pillow_heif

        pillow_heif.register_heif_opener()
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def difference(data: bytes, expected: Any) -> int:
    found = load_image(data)
    assert found.mode == "RGB"
    assert picture_size(data) == found.size
    assert found.size == expected.shape[1::-1]
    return int(np.abs(np.asarray(found).astype(int) - expected).max())


@pytest.mark.parametrize("kind", LOSSY)
def test_every_format_is_read(kind: str, tmp_path: Path) -> None:
    data = written(kind)
    assert difference(data, PIXELS) <= LOSSY[kind]
    path = tmp_path / "named.bin"  # what it is, its bytes say, not its name
    path.write_bytes(data)
    assert np.array_equal(np.asarray(load_image(path)), np.asarray(load_image(data)))


@pytest.mark.parametrize("kind", ["WEBP", "AVIF", "HEIF", "JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_exif_upright_in_every_format_that_has_it(kind: str, orientation: int, turns: int) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    # Given as bytes, pillow-heif writes the turn as cameras do: into the container, and the tag beside it.
    data = written(kind, exif=exif.tobytes())
    assert (b"irot" in data) == (kind in ("HEIF", "AVIF") and orientation != 1)
    assert difference(data, np.rot90(PIXELS, turns)) <= LOSSY[kind]


def test_the_limit_of_pixels_holds_for_every_format() -> None:
    for kind in LOSSY:
        data = written(kind)
        for read in (load_image, picture_size):
            with pytest.raises(ImageError, match=r"has (64 x 48 = )?3072 pixels, at most 3071"):
                read(data, pixel_limit=3071)


@pytest.mark.parametrize("kind", ["WEBP", "AVIF", "HEIF"])
def test_files_cut_short_are_refused(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    data = written(kind, noise)
    for n in (12, 40, len(data) // 2):
        with pytest.raises(ImageError, match=r"not a picture in a known format|cannot be decoded|AVIF picture, or"):
            load_image(data[:n])


def test_heic_without_its_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = written("HEIF")
    formats._register_heif.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BackendUnavailable, match=r"HEIC picture.*pip install 'edge-runtime\[heif\]'"):
        load_image(data)
    formats._register_heif.cache_clear()


SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><circle r="4"/></svg>'


@pytest.mark.parametrize(
    "data",
    [
        SVG.encode(),
        b'\xef\xbb\xbf<?xml version="1.0" encoding="utf-8"?>\n<!-- made by hand -->\n' + SVG.encode(),
        b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "svg11.dtd">\n' + SVG.upper().encode(),
        SVG.encode("utf-16"),
    ],
)
def test_svg_is_refused_by_name(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"is an SVG drawing.*export it as PNG"):
        load_image(data)
    path = tmp_path / "logo.svg"
    path.write_bytes(data)
    refused(["run", str(path), "What is it?"], r"logo.svg is an SVG drawing")


def test_html_with_a_drawing_far_inside_is_not_svg() -> None:
    with pytest.raises(ImageError, match="not a picture in a known format"):
        load_image(b"<html>" + b" " * 2000 + SVG.encode())


def test_a_document_where_only_a_picture_will_do() -> None:
    with pytest.raises(ImageError, match="is a PDF document, expected a picture"):
        load_image(b"%PDF-1.7\n...")


def test_a_file_that_is_named_pdf_but_is_not(tmp_path: Path) -> None:
    path = tmp_path / "scan.PDF"
    path.write_bytes(b"<html>Your session has ended.</html>")
    refused(["run", str(path), "What is it?"], r"scan\.PDF is not a PDF: it does not start like one")


def test_open_files_are_pictures_too(tmp_path: Path) -> None:
    data = written("PNG")
    file = io.BytesIO(data)
    for _ in range(2):
        assert np.array_equal(np.asarray(load_image(file)), PIXELS)
    with pytest.raises(Exception, match="opened for text"):
        load_image(io.StringIO("text"))  # type: ignore[arg-type]
    closed = io.BytesIO(data)
    closed.close()
    with pytest.raises(Exception, match="cannot be read"):
        load_image(closed)
