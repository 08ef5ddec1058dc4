"""Random generator + contents → Pillow picture. It knows no questions and no model.

Fonts are Pillow's own and those of Debian packages (see README.md); colours of text and background are drawn by hue.
A few bands of hue and some fonts are kept for the test.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT_FOLDER = Path("/usr/share/fonts")
PILLOW_FONT = "Pillow"
"""Stands for Pillow's built-in font."""

TRAIN_FONTS = (
    PILLOW_FONT,
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansCondensed", "DejaVuSansCondensed-Bold"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerifCondensed"),
    *("LiberationSans-Regular", "LiberationSans-Bold", "LiberationSans-Italic", "LiberationSansNarrow-Bold"),
    *("LiberationSerif-Regular", "LiberationSerif-Bold", "LiberationMono-Bold", "Hack-Regular"),
    *("OpenSans-Regular", "OpenSans-Semibold", "OpenSans-Bold", "Lato-Medium", "Lato-Bold", "Lato-Black"),
)
EASY_FONTS = ("DejaVuSans", "DejaVuSans-Bold", PILLOW_FONT)
TEST_FONTS = ("Roboto-Regular", "Roboto-Medium", "Roboto-Bold", "Carlito-Bold", "Cantarell-Bold")

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS = {
    "red": (225, 30, 40),
    "green": (30, 160, 60),
    "blue": (40, 80, 225),
    "yellow": (245, 225, 40),
    "orange": (255, 145, 30),
    "purple": (135, 35, 170),
    "black": (12, 12, 12),
    "white": (246, 246, 246),
}
TEST_HUES = ((0.08, 0.12), (0.45, 0.50), (0.78, 0.83))
"""Bands of hue (0..1) of text and background that training never uses."""

TEXT_CONTRAST = 100  # smallest difference of luma between text and background, of 255
SHAPE_CONTRAST = 110  # smallest distance in RGB between a shape and the background

Color = tuple[int, int, int]
Place = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Thing:
    """One coloured shape."""

    shape: str
    color: str
    x: float
    y: float
    """Centre, as a fraction of the width and the height."""
    radius: float
    """In pixels."""


@lru_cache(maxsize=1)
def _font_files() -> dict[str, Path]:
    return {path.stem: path for path in sorted(FONT_FOLDER.rglob("*.[to]tf"))}


def available(fonts: Sequence[str]) -> list[str]:
    """Those of `fonts` that are installed."""
    return [name for name in fonts if name == PILLOW_FONT or name in _font_files()]


@lru_cache(maxsize=4096)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Load a font at a size in pixels."""
    if name == PILLOW_FONT:
        return ImageFont.load_default(size)
    return ImageFont.truetype(str(_font_files()[name]), size)


@lru_cache(maxsize=65536)
def text_box(text: str, font: str, size: int) -> tuple[float, float, float, float]:
    """Ink of a line of text drawn at (0, 0): left, top, right, bottom in pixels."""
    return load_font(font, size).getbbox(text)


def largest_size(text: str, font: str, width: float, height: float) -> int:
    """Largest size in pixels at which a line fits."""
    left, top, right, bottom = text_box(text, font, 64)
    return int(64 * min(width / (right - left), height / (bottom - top)))


def luma(color: Sequence[float]) -> float:
    """Perceived brightness, 0..255."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def random_color(rng: np.random.Generator, test: bool) -> Color:
    """Colour of text or background; in training one in three is grey, and none is in the test bands."""
    if not test and rng.random() < 0.3:
        grey = int(rng.integers(256))
        return grey, grey, grey
    hue = rng.random()
    if test:
        low, high = TEST_HUES[rng.integers(len(TEST_HUES))]
        hue = low + (high - low) * hue
    else:
        while any(low <= hue < high for low, high in TEST_HUES):
            hue = rng.random()
    red, green, blue = colorsys.hsv_to_rgb(hue, rng.uniform(0.2, 1), rng.uniform(0.1, 1))
    return int(red * 255), int(green * 255), int(blue * 255)


def ground(rng: np.random.Generator, size: tuple[int, int], color: Color) -> Image.Image:
    """Plain or slightly graded background."""
    picture = Image.new("RGB", size, color)
    if rng.random() < 0.3:
        shift = rng.uniform(-45, 45, 3)
        other = tuple(int(np.clip(c + s, 0, 255)) for c, s in zip(color, shift, strict=True))
        mask = Image.linear_gradient("L").resize(size)
        if rng.random() < 0.5:
            mask = Image.linear_gradient("L").transpose(Image.Transpose.ROTATE_90).resize(size)
        picture.paste(other, (0, 0, *size), mask)
    return picture


def add_noise(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """Sensor-like noise on a third of the pictures, up to a deviation of 12."""
    if rng.random() > 0.35:
        return picture
    noise = rng.standard_normal((picture.height, picture.width, 1), np.float32) * np.float32(rng.uniform(2, 12))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


def text_colors(rng: np.random.Generator, test: bool, easy: bool) -> tuple[Color, Color]:
    """Colours of background and text with enough contrast."""
    if easy:
        return (255, 255, 255), (0, 0, 0)
    while True:
        back, ink = random_color(rng, test), random_color(rng, test)
        if abs(luma(back) - luma(ink)) >= TEXT_CONTRAST:
            return back, ink


def draw_text(
    rng: np.random.Generator,
    size: tuple[int, int],
    text: str,
    font: str,
    font_size: int,
    *,
    test: bool = False,
    easy: bool = False,
) -> tuple[Image.Image, list[Box]]:
    """Draw one line at a random place; return the boxes of its characters, in pixels.

    Parameters
    ----------
    size : (width, height) in pixels; the line must fit, see `largest_size`.
    test : take the colours from the bands kept for the test.
    easy : black on white.
    """
    back, ink = text_colors(rng, test, easy)
    picture = ground(rng, size, back)
    left, top, right, bottom = text_box(text, font, font_size)
    margin = 2
    x = rng.uniform(margin, max(margin, size[0] - (right - left) - margin)) - left
    y = rng.uniform(margin, max(margin, size[1] - (bottom - top) - margin)) - top
    ImageDraw.Draw(picture).text((x, y), text, fill=ink, font=load_font(font, font_size))
    return add_noise(rng, picture), character_boxes(text, font, font_size, x, y)


def character_boxes(text: str, font: str, size: int, x: float, y: float) -> list[Box]:
    """Boxes of the characters of a line drawn at (x, y), in pixels."""
    face, boxes = load_font(font, size), []
    for i, character in enumerate(text):
        left, top, right, bottom = text_box(character, font, size)
        start = x + face.getlength(text[:i])
        boxes.append((start + left, y + top, start + right, y + bottom))
    return boxes


def _outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    if shape == "square":
        half = radius * 0.9
        return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    if shape == "triangle":
        return [(x, y - radius), (x + radius, y + 0.85 * radius), (x - radius, y + 0.85 * radius)]
    if shape == "star":
        spokes = [(radius if k % 2 == 0 else 0.42 * radius, math.pi * (k / 5 - 0.5)) for k in range(10)]
        return [(x + r * math.cos(angle), y + r * math.sin(angle)) for r, angle in spokes]
    arm, tip = 0.34 * radius, radius
    corners = [(-arm, -tip), (arm, -tip), (arm, -arm), (tip, -arm), (tip, arm), (arm, arm)]
    return [(x + dx, y + dy) for dx, dy in [*corners, *((-dx, -dy) for dx, dy in corners)]]


def draw_things(
    rng: np.random.Generator, size: tuple[int, int], things: Sequence[Thing], back: Color | None = None
) -> Image.Image:
    """Draw shapes, at twice the size for smooth edges."""
    if back is None:
        back = shape_ground(rng, [thing.color for thing in things])
    picture = ground(rng, size, back).resize((2 * size[0], 2 * size[1]))
    pen = ImageDraw.Draw(picture)
    for thing in things:
        fill = tuple(int(np.clip(c + rng.integers(-12, 13), 0, 255)) for c in COLORS[thing.color])
        x, y, radius = 2 * thing.x * size[0], 2 * thing.y * size[1], 2 * thing.radius
        if thing.shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            pen.polygon(_outline(thing.shape, x, y, radius), fill=fill)
    return add_noise(rng, picture.resize(size, Image.Resampling.BOX))


def shape_ground(rng: np.random.Generator, colors: Sequence[str]) -> Color:
    """A background that every one of the named colours stands out from."""
    for margin in range(SHAPE_CONTRAST, 0, -2):
        for _ in range(10):
            back = random_color(rng, test=False)
            if all(math.dist(back, COLORS[name]) > margin for name in colors):
                return back
    return 128, 128, 128


def place(rng: np.random.Generator, size: tuple[int, int], radii: Sequence[float]) -> list[Place] | None:
    """Centres (fractions) of shapes that neither touch nor leave the picture; None when they do not fit."""
    centres: list[Place] = []
    for i, radius in enumerate(radii):
        for _ in range(60):
            x = rng.uniform(radius + 1, size[0] - radius - 1)
            y = rng.uniform(radius + 1, size[1] - radius - 1)
            pairs = zip(centres, radii[:i], strict=True)
            if all(math.hypot(x - a, y - b) > 1.15 * (radius + other) for (a, b), other in pairs):
                centres.append((x, y))
                break
        else:
            return None
    return [(x / size[0], y / size[1]) for x, y in centres]
