"""A decoded frame → the upright RGB picture that a player shows: turned, with square pixels, tone-mapped.

Four exceptions to the official recipe, which uses the stored samples as they are (decord does none of this): the
display matrix turns the picture, non-square pixels are squared, HDR (PQ, HLG) is tone-mapped, and transparency is
composed onto white. Knows libav's frames and Pillow's pictures, but no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image

from edge_runtime.errors import VideoError
from edge_runtime.inputs.slicing import Size
from edge_runtime.inputs.transparency import on_white
from edge_runtime.inputs.video.frame_choice import VideoLimits
from edge_runtime.inputs.video.source import check_pixels
from edge_runtime.inputs.video.tone_mapping import CURVES, PEAK, to_sdr

if TYPE_CHECKING:
    import av

DOLBY_VISION = 15
"""The colour space IPT-C2: samples are not YCbCr, and libav does not convert them to RGB."""
WITH_ALPHA = (
    "yuva",
    "rgba",
    "argb",
    "abgr",
    "bgra",
    "gbrap",
    "ya",
    "ayuv",
    "vuya",
    "uyva",
    "pal8",
    "rgba64",
    "bgra64",
)
MAX_ASPECT = 16
"""Width of a pixel divided by its height, or the inverse, beyond which the header is assumed to be wrong."""

# Display matrix, rounded (a, b, c, d): (x, y) goes to (ax + cy, bx + dy). Source: libavutil/display.h.
TURNS = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@dataclass(frozen=True)
class Look:
    """How the samples of a frame are to be shown."""

    form: str
    """Pixel format, colour space and range, for fingerprints."""
    turned: tuple[int, int, int, int]
    curve: int
    """Transfer characteristics."""
    peak: float
    """cd/m² of the brightest pixel; for HDR."""
    aspect: Fraction
    """Width of a pixel divided by its height."""

    @property
    def tone_mapped(self) -> str | None:
        """What it was tone-mapped from: `PQ`, `HLG`, or None."""
        return CURVES.get(self.curve)

    @property
    def pixel_aspect(self) -> list[int] | None:
        """[width, height] of non-square pixels that were squared."""
        return None if self.aspect == 1 else [self.aspect.numerator, self.aspect.denominator]


def look_of(frame: av.VideoFrame, aspect: Fraction | None) -> Look:
    """What a frame says about how to show it.

    Parameters
    ----------
    aspect : of a pixel, according to the stream; None or 0 if it does not say.
    """
    # PyAV before 15 has neither attribute.
    curve, primaries = (int(getattr(frame, name, 2)) for name in ("color_trc", "color_primaries"))
    form = f"{frame.format.name} {frame.colorspace} {frame.color_range} {primaries}"
    peak = _peak(frame) if curve in CURVES else 0.0
    return Look(form, _matrix(frame), curve, peak, aspect or Fraction(1))


def shown_size(name: str, width: int, height: int, look: Look, limits: VideoLimits) -> Size:
    """(width, height) with square pixels, before turning: the shorter side of a pixel grows, so no row is lost.

    Raises
    ------
    VideoError
        When that is larger than allowed, or pixels of this shape are implausible.
    """
    if not 1 / MAX_ASPECT <= look.aspect <= MAX_ASPECT:
        raise VideoError(
            f"{name} has pixels of the shape {look.aspect.numerator} by {look.aspect.denominator}; its header is "
            "damaged: convert it to MP4."
        )
    if look.aspect > 1:
        width = round(width * look.aspect)
    else:
        height = round(height / look.aspect)
    check_pixels(name, width, height, limits)
    return width, height


def picture_of(frame: av.VideoFrame, look: Look, size: Size, name: str) -> Image.Image:
    """A frame in RGB, scaled and turned.

    Raises
    ------
    VideoError
        When its colours are of an unsupported kind.
    ValueError, av.error.FFmpegError
        When libav cannot convert it to RGB.
    """
    if frame.colorspace == DOLBY_VISION:
        raise VideoError(
            f"{name} is in Dolby Vision without an HDR10 or HLG layer, whose colours are not supported; convert it "
            "to H.264."
        )
    wanted: dict[str, Any] = {"width": size[0], "height": size[1]}
    if look.tone_mapped is not None:
        rgb = frame.reformat(**wanted, format="rgb48le").to_ndarray().view(np.uint16)
        picture = Image.fromarray(to_sdr(rgb, look.curve, look.peak))
    elif frame.format.name.startswith(WITH_ALPHA):
        rgba = Image.fromarray(frame.reformat(**wanted, format="rgba").to_ndarray())
        picture = on_white(rgba)
    else:
        picture = Image.fromarray(frame.reformat(**wanted, format="rgb24").to_ndarray())
    return picture.transpose(TURNS[look.turned]) if look.turned in TURNS else picture


def _side_data(frame: av.VideoFrame, kind: str) -> Any:
    """Side data of a frame, or None.

    Not `frame.side_data`: that refers back to the frame, which is then never freed (PyAV 18.1: 3 MB for each full HD
    frame).
    """
    from av.sidedata.sidedata import SideDataContainer

    return SideDataContainer(frame).get(kind)  # type: ignore[call-arg]  # the stub lacks its argument


def _peak(frame: av.VideoFrame) -> float:
    """The brightest pixel of the whole video in cd/m² (MaxCLL), or a default."""
    found = _side_data(frame, "CONTENT_LIGHT_LEVEL")
    most = 0 if found is None else int(np.frombuffer(cast("memoryview", found), np.uint32)[0])
    return float(most) if most else PEAK


def _matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """The display matrix of a frame without translation, rounded to quarter turns."""
    found = _side_data(frame, "DISPLAYMATRIX")
    if found is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = np.frombuffer(cast("memoryview", found), np.int32).tolist()
    largest = max(map(abs, (a, b, c, d))) or 1
    turned = tuple(round(value / largest) for value in (a, b, c, d))
    return turned[0], turned[1], turned[2], turned[3]
