"""Pictures full of characters: first lessons for the vision tower, which learns to name what is under each patch.

Answers teach a new vision tower next to nothing; 60 labelled patches per picture do.
"""

from __future__ import annotations

import numpy as np
from PIL import ImageDraw

from demo.draw import EASY_FONTS, TRAIN_FONTS, add_noise, available, ground, load_font, text_colors
from demo.sample import CHARACTERS, Mark, Sample, Size, pick


def dense_sample(rng: np.random.Generator, size: Size, ease: float = 0.0) -> Sample:
    """Lines of random characters.

    Parameters
    ----------
    ease : share of pictures in black on white and plain fonts.
    """
    easy = rng.random() < ease
    back, ink = text_colors(rng, False, easy)
    picture = ground(rng, size, back)
    pen = ImageDraw.Draw(picture)
    marks = []
    y = int(rng.integers(0, 8))
    while y < size[1] - 12:
        name = pick(rng, available(EASY_FONTS if easy else TRAIN_FONTS))
        font_size = int(rng.integers(16, 30))
        font = load_font(name, font_size)
        x, lowest = float(rng.uniform(-4, 10)), y
        while x < size[0]:
            code = int(rng.integers(len(CHARACTERS)))
            left, top, right, bottom = font.getbbox(CHARACTERS[code])
            pen.text((x, y - top), CHARACTERS[code], fill=ink, font=font)
            box = (x + left, y, x + right, y + bottom - top)
            marks.append(Mark(code, box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]))
            lowest = max(lowest, y + int(bottom - top))
            x += font.getlength(CHARACTERS[code]) + float(rng.uniform(0, 0.3)) * font_size
            if rng.random() < 0.1:
                x += font_size
        y = lowest + int(rng.integers(3, 12))
    if not easy:
        picture = add_noise(rng, picture)
    return Sample("dense", [picture], "", "", marks={"character": marks})
