"""TIFF files of several pages: each is a picture, upright, within the limits."""

from __future__ import annotations

import base64
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_runtime import ImageError, MessageError
from edge_runtime.inputs.documents import DocumentOptions, page_numbers, with_pages
from edge_runtime.inputs.image import EXIF_ORIENTATION, load_image, picture_size
from edge_runtime.inputs.messages import ImagePart, parse_messages
from edge_runtime.prompt.build import iter_images
from support.document_maker import COLOURS, GREEN, SLICING, blocks, colours, pages_tiff, pictures
from support.tiff_maker import directory, tiff


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
    with pytest.raises(ImageError, match="at most 2 are read"):
        pictures([data], page_limit=2)
    with pytest.raises(ImageError, match="bytes, at most 100 are read"):
        pictures([data], file_limit_bytes=100)
    page = with_pages(parse_messages([{"role": "user", "content": [data]}]), DocumentOptions(), SLICING)
    sources = [part.source for part in iter_images(page)]
    assert load_image(sources[0], pixel_limit=850).size == (40, 20)
    with pytest.raises(ImageError, match=r"Page 2 of The document has 30 x 30 = 900 pixels, at most 850"):
        load_image(sources[1], pixel_limit=850)


@pytest.mark.parametrize("kind", ["tiff", "pdf"])
def test_pages_beyond_the_limit_exist(kind: str) -> None:
    """The limit bounds how many pages are read, not which; a TIFF file is walked no further than needed."""
    pages = [Image.new("RGB", (40 + i, 40)) for i in range(6)]
    file = io.BytesIO()
    pages[0].save(file, kind, save_all=True, append_images=pages[1:])

    def numbers(choice: Any, limit: int = 2) -> list[int] | None:
        return page_numbers(ImagePart(file.getvalue()), DocumentOptions(pages=choice, page_limit=limit))

    assert [numbers(choice) for choice in ([5], 6, "5-6", "6,1", "5-", "6-")] == [
        *([5], [6], [5, 6], [6, 1], [5, 6], [6])
    ]
    assert numbers(None, 6) == numbers("1-", 6) == [1, 2, 3, 4, 5, 6]
    for choice in ("3-", "4-6", "1,5-", "4,5-"):
        with pytest.raises(ImageError, match="asked for more than 2 pages, at most 2 are read"):
            numbers(choice)
    with pytest.raises(ImageError, match=r"has (6|more than 2) pages, at most 2 are read"):
        numbers(None)
    for choice in ("7-", "7", [7], "6-7"):
        with pytest.raises(MessageError, match="Page 7 was asked for, but The document has 6 pages"):
            numbers(choice)
    with pytest.raises(MessageError, match="Page 0 was asked for, but The document has 6 pages"):
        numbers("0")


def test_directories_of_a_tiff_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_runtime.inputs.tiff_directories.DIRECTORY_LIMIT", 8)
    page, other = directory(GREY, {254: 0}), directory(SMALL, {254: 1})
    data = tiff(*[page] * 3, *[other] * 9, page)
    assert len(pictures([data], pages="1-3")) == 3
    for choice in (None, "4", "3-"):
        with pytest.raises(
            ImageError, match=r"The document has more than 8 directories, which is the limit; split it"
        ):
            pictures([data], pages=choice)


def test_a_tiff_whose_second_page_is_cut_short() -> None:
    pages = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (60, 60, 3), np.uint8)) for i in range(2)]
    data = pages_tiff(pages)
    with pytest.raises(ImageError, match="damaged or cut short"):
        pictures([data[:-6000]])


# --- directories that are no pages --------------------------------------------------------------------------------

GREY = np.add.outer(np.arange(40) * 3, np.arange(60) * 2).astype(np.uint8)
SMALL = np.full((10, 15), 9, np.uint8)


@pytest.mark.parametrize(
    "tags",
    [{254: 1}, {254: 4}, {254: 5}, {254: 65537}, {255: 2}, {254: [1, 0]}],
    ids=["preview", "mask", "mask of a preview", "DNG's other preview", "old tag", "two values"],
)
def test_previews_masks_and_overviews_are_not_pages(tags: dict[int, Any]) -> None:
    page, other = directory(GREY, {254: 0}), directory(SMALL, tags)
    for data in (tiff(page, other), tiff(other, page), tiff(page, other, other, other)):
        assert [found.size for found in pictures([data])] == [(60, 40)]
        assert np.array_equal(np.asarray(load_image(data))[..., 0], GREY)
        assert picture_size(data) == (60, 40)
        with pytest.raises(MessageError, match="has 1 page,"):
            pictures([data], pages="2")
    second = directory(255 - GREY, {254: 2, 297: [1, 2]})  # 2: a page of several
    data = tiff(other, page, other, second, other)
    found = pictures([data])
    assert [picture.size for picture in found] == [(60, 40)] * 2
    assert np.array_equal(np.asarray(found[1])[..., 0], 255 - GREY)
    assert np.array_equal(np.asarray(pictures([data], pages="2")[0])[..., 0], 255 - GREY)


def test_pages_by_the_old_tag() -> None:
    data = tiff(*(directory(GREY, {255: kind}) for kind in (1, 3, 2)))
    assert len(pictures([data])) == 2


def test_overviews_in_sub_directories_are_not_pages() -> None:
    data = tiff(directory(GREY), subs=[directory(SMALL, {254: 1}), directory(SMALL)])
    assert np.array_equal(np.asarray(load_image(data))[..., 0], GREY)
    assert len(pictures([data])) == 1


def test_a_preview_is_not_used_for_an_unreadable_picture() -> None:
    data = tiff(directory(SMALL, {254: 1}), subs=[directory(GREY, {254: 0})])
    for read in (load_image, picture_size, lambda source: pictures([source])):
        with pytest.raises(ImageError, match="preview, and its picture is in a SubIFD"):
            read(data)


def test_a_file_of_only_previews_is_one_picture() -> None:
    data = tiff(directory(SMALL, {254: 1}), directory(SMALL, {254: 1}))
    assert [found.size for found in pictures([data])] == [(15, 10)]


# --- pixels that are no squares -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "across, down, size",
    [
        ((204, 1), (98, 1), (60, 83)),
        ((204, 1), (196, 1), (60, 42)),
        ((8031, 100), (3858, 100), (60, 83)),
        ((98, 1), (204, 1), (125, 40)),
        ((200, 1), (199, 1), (60, 40)),
        ((300, 1), (1, 1), (60, 40)),
        ((0, 1), (98, 1), (60, 40)),
        ((204, 0), (98, 1), (60, 40)),
        ((72, 1), (72, 1), (60, 40)),
    ],
)
@pytest.mark.parametrize("unit", [1, 2, 3])
def test_oblong_pixels_are_squared(across: Any, down: Any, size: tuple[int, int], unit: int) -> None:
    tags = {282: across, 283: down, 296: unit}
    data = tiff(directory(GREY, tags))
    found = load_image(data)
    assert found.size == picture_size(data) == size
    expected = Image.fromarray(GREY).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    turned = tiff(directory(GREY, {**tags, 274: 6}))
    assert load_image(turned).size == picture_size(turned) == size[::-1]
    several = tiff(directory(GREY, tags), directory(GREY, {282: (72, 1), 283: (72, 1)}))
    assert [page.size for page in pictures([several])] == [size, (60, 40)]


def test_squared_pixels_count_against_the_limit() -> None:
    data = tiff(directory(GREY, {282: (204, 1), 283: (98, 1)}))
    assert load_image(data, pixel_limit=60 * 83).size == (60, 83)
    with pytest.raises(ImageError, match=r"60 x 83 = 4980 pixels, at most 4979"):
        load_image(data, pixel_limit=60 * 83 - 1)


def test_faxes_in_one_bit() -> None:
    bits = Image.fromarray(GREY > 60)
    out = io.BytesIO()
    bits.save(out, "TIFF", compression="group4", tiffinfo={282: 204.0, 283: 98.0, 296: 2})
    assert load_image(out.getvalue()).size == (60, 83)


def test_densities_of_other_formats_are_about_paper() -> None:
    """No viewer applies dots per inch; an aspect of pixels, as pHYs and JFIF give it with unit 0, counts."""
    picture = Image.fromarray(GREY)
    for kind in ("PNG", "JPEG"):
        out = io.BytesIO()
        picture.save(out, kind, dpi=(204, 98))
        assert load_image(out.getvalue()).size == (60, 40)
    data = out.getvalue()
    place = data.find(b"JFIF\0") + 7
    for density, size in (((2, 1), (60, 80)), ((1, 2), (120, 40)), ((60, 40), (60, 40)), ((0, 1), (60, 40))):
        aspect = data[:place] + struct.pack(">BHH", 0, *density) + data[place + 5 :]
        assert load_image(aspect).size == picture_size(aspect) == size


# --- samples ------------------------------------------------------------------------------------------------------

DEEP = np.add.outer(np.arange(40) * 900, np.arange(60) * 500).astype(np.uint16)
DEEP[0, 0] = 65535


def grey_of(data: bytes) -> np.ndarray[Any, Any]:
    found = np.asarray(load_image(data))
    assert np.array_equal(found[..., 0], found[..., 1])
    return found[..., 0]


def test_white_is_zero_in_16_bits() -> None:
    expected = 255 - np.rint(DEEP / 257).astype(np.uint8)
    assert np.array_equal(grey_of(tiff(directory(DEEP, {262: 0}))), expected)
    for compression in ("tiff_lzw", "tiff_deflate"):
        out = io.BytesIO()
        Image.fromarray(DEEP).save(out, "TIFF", compression=compression)
        entry = struct.pack("<HHIH", 262, 3, 1, 1)
        assert out.getvalue().count(entry) == 1
        data = out.getvalue().replace(entry, struct.pack("<HHIH", 262, 3, 1, 0))
        assert np.array_equal(grey_of(data), expected)
    assert np.array_equal(grey_of(tiff(directory(GREY, {262: 0}))), 255 - GREY)
    several = pictures([tiff(directory(DEEP, {262: 0}), directory(DEEP))])
    assert np.array_equal(np.asarray(several[0]), 255 - np.asarray(several[1]))


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_fewer_bits_in_16(bits: int) -> None:
    """As cameras, scanners and microscopes write them; a tag, or the largest sample, shows it."""
    values = (DEEP >> (16 - bits)).astype(np.uint16)
    most = (1 << bits) - 1
    expected = np.rint(values / most * 255)
    for tags in ({}, {281: most}, {340: 0, 341: most}):
        assert np.abs(grey_of(tiff(directory(values, tags))).astype(int) - expected).max() <= 1
        inverted = grey_of(tiff(directory(values, {**tags, 262: 0})))
        assert np.abs(255 - inverted.astype(int) - expected).max() <= 1
    dark = values // 4
    assert np.abs(grey_of(tiff(directory(dark, {281: most}))) - expected / 4).max() <= 1, "dark, as the tag says"
    whole = grey_of(tiff(directory(values, {281: 65535})))
    assert np.array_equal(whole, np.rint(values / 257))


def test_samples_of_12_bits() -> None:
    values = (DEEP >> 4).astype(np.uint16)
    pairs = values.reshape(40, -1, 2).astype(int)
    packed = np.stack([pairs[..., 0] >> 4, (pairs[..., 0] & 15) << 4 | pairs[..., 1] >> 8, pairs[..., 1] & 255], -1)
    _, tags = directory(values, {258: [12]})
    found = grey_of(tiff((packed.astype(np.uint8).tobytes(), tags)))
    assert np.abs(found - values / 4095 * 255).max() <= 1


def test_signed_samples() -> None:
    values = DEEP.astype(np.int32) - 32768
    for dtype, shift in ((np.int16, 0), (np.int8, 8)):
        stored = (values >> shift).astype(dtype)
        with pytest.raises(ImageError, match=r"signed samples from -\d+ to \d+, and no tag says"):
            load_image(tiff(directory(stored, {339: 2})))
        low, high = int(stored.min()), int(stored.max())
        found = grey_of(tiff(directory(stored, {339: 2, 340: low, 341: high})))
        assert np.abs(found - (stored.astype(float) - low) / (high - low) * 255).max() <= 1
    positive = (DEEP >> 1).astype(np.int16)
    assert np.abs(grey_of(tiff(directory(positive, {339: 2}))) - positive / 32767 * 255).max() <= 1


def test_colours_of_fewer_bits_in_16_are_refused() -> None:
    colours = np.dstack([DEEP, DEEP // 2, DEEP // 3]).astype(np.uint16)
    assert np.array_equal(np.asarray(load_image(tiff(directory(colours)))), colours >> 8)
    for tags in ({}, {281: [4095] * 3}):
        with pytest.raises(ImageError, match="colours of 12 bits in samples of 16"):
            load_image(tiff(directory(colours >> 4, tags)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colours_in_planes(dtype: Any) -> None:
    shift = 8 * (np.dtype(dtype).itemsize - 1)
    planes = np.stack([GREY, 255 - GREY, GREY // 2]).astype(dtype) << shift
    _, tags = directory(np.moveaxis(planes, 0, -1), {284: 2})
    size = planes[0].nbytes
    data = tiff((planes.astype(planes.dtype.newbyteorder("<")).tobytes(), {**tags, 278: 40}))
    # Three strips: their places are written into the file's own list.
    entry, counts = struct.pack("<HHI", 273, 3, 1), struct.pack("<HHI", 279, 3, 1)
    lists = struct.pack("<6I", *(8 + size * i for i in range(3)), *[size] * 3)
    end = len(data)
    data = data.replace(entry + struct.pack("<HH", 8, 0), struct.pack("<HHII", 273, 4, 3, end))
    place = data.find(counts)
    data = data[:place] + struct.pack("<HHII", 279, 4, 3, end + 12) + data[place + 12 :] + lists
    assert np.array_equal(np.asarray(load_image(data)), np.moveaxis(planes >> shift, 0, -1))
    assert np.array_equal(np.asarray(pictures([data])[0]), np.moveaxis(planes >> shift, 0, -1))


@pytest.mark.parametrize("photometric, mode", [(5, "CMYK"), (8, "LAB"), (6, "YCbCr")])
def test_other_colour_spaces_as_pillow_reads_them(photometric: int, mode: str) -> None:
    bands = [GREY, 255 - GREY, GREY // 2, GREY // 4][: 4 if mode == "CMYK" else 3]
    tags = {262: photometric} | ({530: [1, 1]} if mode == "YCbCr" else {})
    data = tiff(directory(np.dstack(bands), tags))
    opened = Image.open(io.BytesIO(data))
    assert opened.mode == mode
    assert np.array_equal(np.asarray(load_image(data)), np.asarray(opened.convert("RGB")))


def test_float_stays_refused() -> None:
    with pytest.raises(ImageError, match="floating-point samples, whose white is not defined"):
        load_image(tiff(directory(GREY.astype(np.float32), {339: 3})))
    for dtype in (np.float16, np.float64):
        with pytest.raises(ImageError, match="a TIFF file whose samples or compression Pillow cannot read"):
            load_image(tiff(directory(GREY.astype(dtype), {339: 3})))


# --- raw photographs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix, make, sensor, first",
    [
        (".dng", "Leica", {262: 32803}, {254: 1, 50706: b"\1\4\0\0"}),
        (".tif", "Apple", {262: 34892}, {254: 0, 50706: b"\1\4\0\0"}),
        (".nef", "NIKON CORPORATION", {262: 32803, 259: 34713}, {254: 1}),
        (".arw", "SONY", {262: 32803, 259: 32767}, {254: 1}),
        (".pef", "PENTAX", {262: 32803, 259: 65535}, {}),
        (".bin", "SAMSUNG", {262: 32803, 259: 32770}, {254: 1}),
        (".3fr", "Hasselblad", {262: 32803}, {254: 1}),
        (".cr2", "Canon", {259: 6, 50752: [2, 2592, 2592]}, {}),
        (".NEF", "", {}, {}),
    ],
)
def test_raw_photographs_are_not_answered_from_their_preview(
    suffix: str, make: str, sensor: dict[int, Any], first: dict[int, Any], tmp_path: Path
) -> None:
    preview = directory(np.dstack([GREY] * 3), {271: make, **first})
    for data in (tiff(preview, subs=[directory(DEEP, sensor)]), tiff(preview, directory(DEEP, sensor))):
        path = tmp_path / f"photo{suffix}"
        path.write_bytes(data)
        for read in (load_image, picture_size, lambda source: pictures([source])):
            with pytest.raises(
                ImageError, match=r"photo.* is a raw photograph \([A-Z0-9]{3}\), which cannot be read"
            ):
                read(path)
        if sensor:
            with pytest.raises(ImageError, match=r"The (picture|document) is a raw photograph"):
                pictures([data])
