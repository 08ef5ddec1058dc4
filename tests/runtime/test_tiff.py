"""TIFF files of several pages: each is a picture, upright, within the limits."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_runtime import ImageError, MessageError
from edge_runtime.documents import DocumentOptions, with_pages
from edge_runtime.image import EXIF_ORIENTATION, load_image, picture_size
from edge_runtime.messages import parse_messages
from edge_runtime.prompt import iter_images
from runtime.document_maker import COLOURS, GREEN, SLICING, blocks, colours, pages_tiff, pictures


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate", "jpeg", "packbits"])
def test_every_page_of_a_tiff_becomes_a_picture(compression: str | None, tmp_path: Path) -> None:
    pages = blocks([(40, 20), (30, 30), (20, 50)])
    data = pages_tiff(pages, **({"compression": compression} if compression else {}))
    path = tmp_path / "fax.tif"
    path.write_bytes(data)
    for source in (
        data,
        path,
        str(path),
        io.BytesIO(data),
        "data:image/tiff;base64," + base64.b64encode(data).decode(),
    ):
        found = pictures([{"image": source}])
        assert [page.size for page in found] == [page.size for page in pages]
        assert np.abs(np.subtract(colours(found), COLOURS)).max() <= (2 if compression == "jpeg" else 0)
    assert [page.size for page in pictures([path], pages="3,1")] == [(20, 50), (40, 20)]
    assert [page.size for page in pictures([{"type": "image", "image": path, "pages": [2]}])] == [(30, 30)]
    with pytest.raises(MessageError, match=r"Page 4 was asked for, but .*fax.tif has 3 pages"):
        pictures([path], pages="4")


def test_a_tiff_of_one_page_is_a_picture_like_any_other() -> None:
    out = io.BytesIO()
    Image.new("RGB", (12, 8), GREEN).save(out, "TIFF")
    assert colours(pictures([out.getvalue()])) == [GREEN]
    assert colours(pictures([out.getvalue()], pages="1")) == [GREEN]
    with pytest.raises(MessageError, match="has 1 page,"):
        pictures([out.getvalue()], pages="2")


def test_pages_of_a_tiff_are_turned_upright_each_by_its_own_tag() -> None:
    tags = [6, 1, 8]
    pixels = [np.random.default_rng(i).integers(0, 256, (20 + i, 40, 3), np.uint8) for i in range(3)]
    pages = [Image.fromarray(page) for page in pixels]
    for page, tag in zip(pages, tags, strict=True):
        page.encoderinfo = {"tiffinfo": {EXIF_ORIENTATION: tag}}  # type: ignore[attr-defined]
    data = pages_tiff(pages, tiffinfo={EXIF_ORIENTATION: tags[0]})
    found = pictures([data])
    upright = [np.rot90(pixels[0], -1), pixels[1], np.rot90(pixels[2], 1)]
    for page, expected in zip(found, upright, strict=True):
        assert np.array_equal(np.asarray(page), expected)
    sources = [
        part.source
        for part in iter_images(
            with_pages(parse_messages([{"role": "user", "content": [data]}]), DocumentOptions(), SLICING)
        )
    ]
    assert [picture_size(source) for source in sources] == [page.size for page in found]


def test_limits_of_a_tiff() -> None:
    data = pages_tiff(blocks([(40, 20), (30, 30), (20, 50)]))
    with pytest.raises(ImageError, match="at most 2 are looked at"):
        pictures([data], page_limit=2)
    with pytest.raises(ImageError, match="bytes, at most 100 are read"):
        pictures([data], file_limit_bytes=100)
    page = with_pages(parse_messages([{"role": "user", "content": [data]}]), DocumentOptions(), SLICING)
    sources = [part.source for part in iter_images(page)]
    assert load_image(sources[0], pixel_limit=850).size == (40, 20)
    with pytest.raises(ImageError, match=r"Page 2 of The document has 30 x 30 = 900 pixels, at most 850"):
        load_image(sources[1], pixel_limit=850)


def test_a_tiff_whose_second_page_is_cut_short() -> None:
    pages = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (60, 60, 3), np.uint8)) for i in range(2)]
    data = pages_tiff(pages)
    with pytest.raises(ImageError, match="damaged or cut short"):
        pictures([data[:-6000]])
