"""Draw the README's strip of pictures, with the demo model's answer about each.

    python demo/strip.py examples/strip.png

Samples are held out and picked for variety; answers are the model's own, right or wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.evaluate import ask, draw
from demo.sample import Sample
from edge_runtime import Model

SAMPLES = (("unseen fonts", 5), ("slices", 2), ("shape", 2), ("filter", 3), ("video", 5))
HEIGHT, MARGIN, LINE = 150, 14, 20
PAPER, INK, FAINT = "#ffffff", "#1b1b1b", "#666666"


def tile(sample: Sample, answer: str) -> Image.Image:
    """Pictures of a sample side by side, question and answer below."""
    pictures = [
        picture.resize((max(1, round(picture.width * HEIGHT / picture.height)), HEIGHT), Image.Resampling.LANCZOS)
        for picture in sample.pictures
    ]
    font = ImageFont.load_default(15)
    texts = (sample.question, answer)
    inner = sum(picture.width for picture in pictures) + 6 * (len(pictures) - 1)
    width = max(inner, *(int(font.getlength(text)) for text in texts))
    result = Image.new("RGB", (width + 2 * MARGIN, HEIGHT + 2 * LINE + 3 * MARGIN), PAPER)
    x = MARGIN
    for picture in pictures:
        result.paste(picture, (x, MARGIN))
        x += picture.width + 6
    pen = ImageDraw.Draw(result)
    for row, (text, color) in enumerate(zip(texts, (FAINT, INK), strict=True)):
        pen.text((MARGIN, HEIGHT + 2 * MARGIN + row * LINE), text, color, font)
    return result


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    with Model.load(options.model) as model:
        samples = [draw(kind, number) for kind, number in SAMPLES]
        tiles = [tile(sample, ask(model, sample)) for sample in samples]
    strip = Image.new("RGB", (sum(t.width for t in tiles), tiles[0].height), PAPER)
    x = 0
    for one in tiles:
        strip.paste(one, (x, 0))
        x += one.width
    strip.save(options.out, optimize=True)


if __name__ == "__main__":
    main()
