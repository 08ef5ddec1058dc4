"""Places that an answer names in a picture: converted to pixels, and drawn.

MiniCPM-V writes `<ref>label</ref><box>x1 y1 x2 y2</box>`, also `<quad>` with four corners and `<point>` with one; the
numbers are thousandths of the picture's width and height, whatever its size.

Source: the authors' description (OpenBMB/MiniCPM-V issues 185, 772 and 982).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from PIL import Image, ImageColor, ImageDraw, ImageFont

from edge_runtime.errors import ImageError
from edge_runtime.system.atomic_files import unfinished, why_not_written

SCALE = 1000  # the width and height of every picture, for the model
N_NUMBERS = {"box": 4, "quad": 8, "point": 2}

# A closing tag may be missing or lack its slash, as in the authors' own examples.
_TAGS = re.compile(r"<ref>(?P<label>.*?)</ref>|<(?P<kind>box|quad|point)>(?P<numbers>[^<]*)", re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")

Kind = Literal["box", "quad", "point"]
PALETTE = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45")


@dataclass(frozen=True)
class Region:
    """A place in a picture."""

    kind: Kind
    label: str | None
    """Text of the nearest `<ref>` before it."""
    points: list[tuple[float, float]]
    """(x, y) in pixels: two opposite corners of a box (upper left first), four corners of a quad, one point."""

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in pixels."""
        xs, ys = [x for x, _ in self.points], [y for _, y in self.points]
        return min(xs), min(ys), max(xs), max(ys)


def find_regions(text: str, size: tuple[int, int]) -> list[Region]:
    """Read the places that an answer names, in order; one with the wrong number of coordinates is ignored.

    Parameters
    ----------
    size : (width, height) of the picture in pixels, upright.
    """
    return [*_regions(text, size)]


def _regions(text: str, size: tuple[int, int]) -> Iterator[Region]:
    label = None
    for match in _TAGS.finditer(text):
        if match["kind"] is None:
            label = match["label"].strip() or None
            continue
        kind = cast(Kind, match["kind"])
        numbers = [float(number) for number in _NUMBER.findall(match["numbers"])]
        if len(numbers) != N_NUMBERS[kind]:
            continue
        inside = [min(max(number / SCALE, 0.0), 1.0) for number in numbers]
        xs, ys = [x * size[0] for x in inside[::2]], [y * size[1] for y in inside[1::2]]
        if kind == "box":
            xs, ys = sorted(xs), sorted(ys)
        yield Region(kind, label, [*zip(xs, ys, strict=True)])


def draw_regions(picture: Image.Image, regions: list[Region]) -> Image.Image:
    """Draw places with their labels on a copy of a picture.

    Every line has a dark and a light edge, so it is visible on any background.
    """
    canvas = picture.convert("RGB")
    draw = ImageDraw.Draw(canvas)
    unit = max(1, round(max(canvas.size) / 600))  # of line widths, so that lines survive scaling down
    font = ImageFont.load_default(12 * unit + 3)
    for number, region in enumerate(regions):
        colour = PALETTE[number % len(PALETTE)]
        for width, shade in ((unit * 2 + 4 * unit, "black"), (unit * 2 + 2 * unit, "white"), (unit * 2, colour)):
            _outline(draw, region, width, shade, unit)
    for number, region in enumerate(regions):  # above all lines
        _write_label(draw, canvas.size, region, str(number + 1), PALETTE[number % len(PALETTE)], font, unit)
    return canvas


def check_drawing(target: Path) -> None:
    """Check a drawing's file name before any work is done.

    Raises
    ------
    ImageError
        When its suffix stands for no known format, or its folder does not exist.
    """
    if Image.registered_extensions().get(target.suffix.lower()) not in Image.SAVE:
        raise ImageError(f"The drawing {target} has no suffix of a picture format; name it {target.stem}.png.")
    if not target.absolute().parent.is_dir():
        raise ImageError(f"The folder {target.absolute().parent} for the drawing does not exist; make it first.")


def save_drawing(picture: Image.Image, target: Path) -> None:
    """Write a picture, completely or not at all.

    Raises
    ------
    ImageError
        When it cannot be written.
    """
    check_drawing(target)
    try:
        with unfinished(lambda token: target.with_name(f".{target.name}.{token}{target.suffix}")) as temporary:
            picture.save(temporary)
            temporary.replace(target)
    except OSError as error:
        raise ImageError(f"The drawing {why_not_written(error, target)}; choose another place.") from None
    except ValueError as error:
        raise ImageError(f"The drawing {target} cannot be written: {error}; choose another place.") from None


def _outline(draw: ImageDraw.ImageDraw, region: Region, width: int, colour: str, unit: int) -> None:
    if region.kind == "point":
        x, y = region.points[0]
        radius = 4 * unit + width / 2
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        return
    corners = region.points
    if region.kind == "box":
        (x1, y1), (x2, y2) = corners
        corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    draw.line([*corners, corners[0], corners[1]], fill=colour, width=width, joint="curve")


def _is_latin(text: str) -> bool:
    return text.isprintable() and all(ord(c) < 256 for c in text)


def _write_label(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    region: Region,
    number: str,
    colour: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    unit: int,
) -> None:
    """Draw a label in a filled box above its place, moved inside if it would leave the picture."""
    text = region.label if region.label and _is_latin(region.label) else number  # the font has no other letters
    left, top, right, bottom = draw.textbbox((0, 0), text[:60], font=font)
    width, height, edge = right - left + 6 * unit, bottom - top + 6 * unit, 3 * unit
    x = min(max(region.bounds[0] - edge, 0), max(size[0] - width, 0))
    above = region.bounds[1] - height - edge
    y = above if above >= 0 else min(region.bounds[1] + edge, max(size[1] - height, 0))
    draw.rectangle((x, y, x + width, y + height), fill=colour, outline="white", width=max(1, unit // 2))
    brightness = sum(w * c for w, c in zip((0.299, 0.587, 0.114), ImageColor.getrgb(colour), strict=True))
    ink = "black" if brightness > 140 else "white"
    draw.text((x + edge - left, y + edge - top), text[:60], fill=ink, font=font)
