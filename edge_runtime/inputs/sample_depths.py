"""Grey samples of more than 8 bits, or of fewer bits than their container → 8 bits.

The official recipe clips at 255, which makes every such picture white. Here they are scaled from the file's black to
its white. TIFF keeps 10, 12 or 14 bits of a camera or scanner in 16, and says so in tags that are often missing: then
the largest sample shows how many bits are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from edge_runtime.errors import ImageError

SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
"""Pillow's modes of grey samples with more than 8 bits."""
_DEPTHS = (8, 10, 12, 14, 15, 16)
_BITS, _PHOTOMETRIC, _MAX_SAMPLE, _SAMPLE_FORMAT, _SMIN_SAMPLE, _SMAX_SAMPLE = 258, 262, 281, 339, 340, 341
_WHITE_IS_ZERO, _SIGNED = 0, 2


@dataclass(frozen=True)
class SampleFormat:
    """What a TIFF page says about its samples; the defaults are for other files."""

    bits: int = 16
    may_be_fewer: bool = False
    """Whether fewer bits than the container's may be in use."""
    white_is_zero: bool = False
    signed: bool = False
    largest: int = 0
    """The largest sample according to the file; 0 if it does not say."""
    range: tuple[int, int] | None = None
    """Black and white according to the file."""


def sample_format(picture: Image.Image) -> SampleFormat:
    """What an opened picture says about its samples."""
    if picture.format != "TIFF":
        return SampleFormat()
    tags = getattr(picture, "tag_v2", {})
    low, high = _number(tags, _SMIN_SAMPLE), _number(tags, _SMAX_SAMPLE)
    bits = _number(tags, _BITS) or 1
    return SampleFormat(
        bits,
        may_be_fewer=bits == 16,
        white_is_zero=_number(tags, _PHOTOMETRIC) == _WHITE_IS_ZERO and bits > 8,  # below, Pillow inverts
        signed=_number(tags, _SAMPLE_FORMAT) == _SIGNED,
        largest=max(_number(tags, _MAX_SAMPLE) or 0, high or 0),
        range=(low, high) if low is not None and high is not None and low < high else None,
    )


def to_grey(picture: Image.Image, form: SampleFormat, name: str, key: Any = None) -> tuple[Image.Image, Image.Image]:
    """Scale grey samples to 8 bits.

    Parameters
    ----------
    picture : one of `SIXTEEN_BIT`, or mode L with signed samples.
    key : sample that is transparent, or None.

    Returns
    -------
    grey, alpha : mode L each.

    Raises
    ------
    ImageError
        When nothing says which sample is black and which is white.
    """
    values = np.asarray(picture)
    if form.signed and values.dtype == np.uint8:
        values = values.view(np.int8)
    low, high = int(values.min()), int(values.max())
    black, white = _black_and_white(low, high, form, name)
    # A table of the values that occur: a picture of 200 million pixels must not take eight bytes each.
    steps = np.clip(np.arange(low, high + 1, dtype=np.int64), black, white) - black
    table = ((steps * 510 + (white - black)) // (2 * (white - black))).astype(np.uint8)
    if form.white_is_zero:
        table = 255 - table
    alpha = np.full(high - low + 1, 255, np.uint8)
    if isinstance(key, int) and low <= key <= high:
        alpha[key - low] = 0
    places: npt.NDArray[Any] = values.astype(np.int32) - low if low else values
    return Image.fromarray(table[places]), Image.fromarray(alpha[places])


def refuse_hidden_bits(picture: Image.Image, form: SampleFormat, name: str) -> None:
    """Refuse colours of 16 bits, of which Pillow keeps the upper 8, if only lower ones are in use.

    Raises
    ------
    ImageError
        When only lower bits are in use.
    """
    if not form.may_be_fewer or picture.mode not in ("RGB", "RGBA", "CMYK"):
        return
    values = np.asarray(picture)[..., : 4 if picture.mode == "CMYK" else 3]
    largest = int(values.max())
    if 0 < largest < 64 and (0 < form.largest < 1 << 14 or (not form.largest and largest < 16)):
        raise ImageError(
            f"{name} holds colours of {8 + largest.bit_length()} bits in samples of 16, which are read as nearly "
            "black; save it with 8 bits per sample."
        )


def _black_and_white(low: int, high: int, form: SampleFormat, name: str) -> tuple[int, int]:
    if form.range is not None and (form.signed or form.range[1] > 65535):
        return form.range
    if low < 0:
        raise ImageError(
            f"{name} holds signed samples from {low} to {high}, and no tag says which are black and white; save it "
            "with 8 or 16 bits per sample, without a sign."
        )
    if high > 65535:
        raise ImageError(f"{name} holds 32-bit samples from {low} to {high}; save it with 8 or 16 bits per sample.")
    if form.may_be_fewer or form.signed:
        used = max(high, min(form.largest, 65535))
        bits = next(bits for bits in _DEPTHS if used < 1 << bits)
        return 0, (1 << min(bits, 7) if form.bits == 8 else 1 << bits) - 1
    return 0, (1 << min(form.bits, 16)) - 1


def _number(tags: Any, tag: int) -> int | None:
    """A tag's value, or its first one; None if it is absent, damaged or not a whole number."""
    try:
        value = tags.get(tag)
        value = value[0] if isinstance(value, tuple) else value
        return int(value) if value is not None and int(value) == value else None
    except (ValueError, TypeError, LookupError, OverflowError, SyntaxError):
        return None
