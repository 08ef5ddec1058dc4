"""Seed → samples: pictures, a question and the right answer, by construction.

    python demo/data.py sheet.png        # one sample of every kind, with question and answer

A sample knows nothing of tensors; `batches.py` packs samples for training. `draw.py` draws text and things. Whatever
is marked `test` (words, random strings, fonts, hues) never appears in training.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.draw import EASY_FONTS, TEST_FONTS, TRAIN_FONTS, available, draw_text, largest_size
from demo.sample import CHARACTERS, Mark, Sample, Size, pick
from demo.things import count_sample, pictures_sample, shape_sample, video_sample
from demo.words import TEST_WORDS, TRAIN_WORDS, is_test_word
from edge_runtime.inputs.slicing import SlicePlan, plan_slices
from edge_runtime.weights.config import SlicingConfig

SIDE = 112  # pixels: scale_resolution of the demo model
SLICING = SlicingConfig(SIDE, 14, 9, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

MAX_LENGTH = 6
MIN_FONT = 16  # pixels at the scale the vision tower sees; smaller text is not promised
UNREADABLE_FONT = 12.5  # pixels; text this small in the overview is read in the slices
MAX_ASPECT = 4.0

TEXT_QUESTIONS = (
    *("What does it say?", "What does the text say?", "Read the text.", "What is written in the image?"),
    *("What is written here?", "What is the text?", "Read this."),
)
CHAT = {
    "Hello": "Hello! Send me a picture.",
    "Hi": "Hello! Send me a picture.",
    "Who are you?": "I am a tiny demo model.",
    "What can you do?": "I read short text, name shapes and colors, count, and follow a moving ball.",
}


def still_size(rng: np.random.Generator, max_aspect: float = MAX_ASPECT) -> Size:
    """Size of a picture that is not cut: one in four is the model's square."""
    if rng.random() < 0.25:
        return SIDE, SIDE
    aspect = math.exp(rng.uniform(-math.log(max_aspect), math.log(max_aspect)))
    side = SIDE * (1.0 if rng.random() < 0.5 else rng.uniform(0.75, 1.0))
    return int(side * math.sqrt(aspect)), int(side / math.sqrt(aspect))


def patch_size(rng: np.random.Generator) -> Size:
    """Size in whole patches that is encoded without resizing."""
    while True:
        cols = int(rng.integers(5, 14))
        size = (14 * cols, 14 * (64 // cols))
        if plan_slices(*size, SLICING).source == size:
            return size


def large_size(rng: np.random.Generator) -> Size:
    """Size of a picture that is cut into two to nine cells."""
    side = SIDE * math.sqrt(math.exp(rng.uniform(math.log(1.3), math.log(14))))
    aspect = math.exp(rng.uniform(-1, 1) * math.log(MAX_ASPECT) * 0.7)
    return int(side * math.sqrt(aspect)), int(side / math.sqrt(aspect))


def random_text(rng: np.random.Generator, length: int, test: bool) -> str:
    """A word, digits, capitals or both; test strings of three or more characters never occur in training."""
    while True:
        kind = rng.random()
        words = [word for word in (TEST_WORDS if test else TRAIN_WORDS) if len(word) == length]
        if kind < 0.4 and words:
            return pick(rng, words)
        # O and 0, I and 1 look the same in some fonts: a mixed string leaves out one of each pair.
        letters = "0123456789" if kind < 0.6 else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        if kind > 0.85:
            letters = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
        text = "".join(pick(rng, letters) for _ in range(length))
        if length < 3 or is_test_word(text) == test:
            return text


def font_limits(rng: np.random.Generator, size: Size, plan: SlicePlan, train: bool) -> tuple[float, float]:
    """Smallest and largest font size in pixels of the picture."""
    if plan.n_slices == 1:
        scale = min(plan.source[0] / size[0], plan.source[1] / size[1])
        return MIN_FONT / scale, 70 / scale
    scale = min(plan.refine[0] / size[0], plan.refine[1] / size[1])
    overview = max(plan.source[0] / size[0], plan.source[1] / size[1])
    least = (MIN_FONT + 1) / scale
    if train and rng.random() < 0.25:
        return least, 44 / scale
    return least, max(least + 1, UNREADABLE_FONT / overview)


def text_sample(
    rng: np.random.Generator,
    size: Size,
    *,
    test_fonts: bool = False,
    test_words: bool = False,
    text: str | None = None,
    ease: float = 0.0,
) -> Sample | None:
    """One line of text; None when this text does not fit this picture at a legible size.

    Parameters
    ----------
    ease : share of pictures in black on white and plain fonts; while it is high, text is short, too.
    """
    easy = rng.random() < ease
    if text is None:
        longest = 2 if ease > 0.8 else 4 if ease > 0.65 else MAX_LENGTH
        length = min(longest, int(rng.choice(6, p=(0.06, 0.09, 0.14, 0.19, 0.24, 0.28))) + 1)
        text = random_text(rng, length, test_words)
    fonts = available(TEST_FONTS if test_fonts else EASY_FONTS if easy else TRAIN_FONTS)
    if not fonts:
        raise FileNotFoundError("None of the held-out fonts is installed; demo/README.md names the packages.")
    font = pick(rng, fonts)
    least, most = font_limits(rng, size, plan_slices(*size, SLICING), train=not test_words)
    most = min(most, largest_size(text, font, size[0] - 6, size[1] - 6))
    if most < least:
        return None
    font_size = math.ceil(least) + int((most - math.ceil(least)) * rng.random() ** 1.5)
    picture, boxes = draw_text(rng, size, text, font, font_size, test=test_fonts, easy=easy)
    codes = [CHARACTERS.index(character) for character in text]
    facts = {"characters": codes + [len(CHARACTERS)] * (MAX_LENGTH - len(codes))}
    corners = np.array(boxes) / (*size, *size)
    marks = [Mark(code, *box) for code, box in zip(codes, corners.tolist(), strict=True)]
    return Sample("text", [picture], pick(rng, TEXT_QUESTIONS), text, facts=facts, marks={"character": marks})


def chat_sample(rng: np.random.Generator, size: Size) -> Sample:
    """One of the fixed questions, without a picture."""
    question = pick(rng, list(CHAT))
    return Sample("chat", [], question, CHAT[question])


def _sized(
    sizes: Callable[[np.random.Generator], Size], make: Callable[[np.random.Generator, Size], Sample | None]
) -> Callable[[np.random.Generator], Sample]:
    """Draw sizes until a sample fits."""

    def draw(rng: np.random.Generator) -> Sample:
        while True:
            sample = make(rng, sizes(rng))
            if sample is not None:
                return sample

    return draw


def fitted_text(rng: np.random.Generator, lengths: Sequence[int], *, large: bool, test_fonts: bool) -> Sample:
    """Held-out text with a length drawn evenly from `lengths`, in pictures of any aspect ratio that it fits into."""
    text = random_text(rng, int(rng.choice(lengths)), test=True)
    sizes = large_size if large else still_size
    return _sized(sizes, lambda r, size: text_sample(r, size, test_fonts=test_fonts, test_words=True, text=text))(rng)


def video_size(rng: np.random.Generator) -> Size:
    """Size of video frames."""
    return still_size(rng, max_aspect=1.8)


KINDS: dict[str, Callable[[np.random.Generator], Sample]] = {
    "text to 4": lambda rng: fitted_text(rng, (1, 2, 3, 4), large=False, test_fonts=False),
    "text to 6": lambda rng: fitted_text(rng, (1, 2, 3, 4, 5, 6), large=False, test_fonts=False),
    "unseen fonts": lambda rng: fitted_text(rng, (1, 2, 3, 4, 5, 6), large=False, test_fonts=True),
    "slices": lambda rng: fitted_text(rng, (1, 2, 3, 4, 5, 6), large=True, test_fonts=False),
    "shape": _sized(still_size, shape_sample),
    "count": _sized(still_size, count_sample),
    "filter": _sized(still_size, lambda rng, size: count_sample(rng, size, "filter")),
    "video": _sized(video_size, lambda rng, size: video_sample(rng, size, int(rng.integers(2, 5)))),
    "relation": _sized(still_size, lambda rng, size: shape_sample(rng, size, "relation")),
    "absent": _sized(still_size, lambda rng, size: shape_sample(rng, size, "absent")),
    "followup": _sized(still_size, lambda rng, size: shape_sample(rng, size, "followup")),
    "pictures": _sized(video_size, pictures_sample),
    "shape slices": _sized(large_size, shape_sample),
    "count slices": _sized(large_size, count_sample),
}
"""Name → held-out sample; the first eight are the core skills."""
CORE = tuple(KINDS)[:8]


def draw_sheet(seed: int, columns: int = 6) -> Image.Image:
    """Samples of every kind with question and answer."""
    sheet = Image.new("RGB", (columns * 200, len(KINDS) * 160), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, draw) in enumerate(KINDS.items()):
        rng = np.random.default_rng([seed, row])
        for column in range(columns):
            sample = draw(rng)
            x, y = column * 200 + 4, row * 160 + 4
            for i, picture in enumerate(sample.pictures[:4]):
                small = picture.copy()
                small.thumbnail((190 // len(sample.pictures[:4]), 112))
                sheet.paste(small, (x + i * 190 // len(sample.pictures[:4]), y))
            pen.text((x, y + 114), f"{name}: {sample.question}"[:36], fill="gray")
            pen.text((x, y + 128), f"{sample.answer}  {sample.temporal_ids or ''}", fill="black")
    return sheet


if __name__ == "__main__":
    draw_sheet(seed=0).save(sys.argv[1] if len(sys.argv) > 1 else "sheet.png")
