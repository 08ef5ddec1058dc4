"""One picture of the frames of a video and their groups: shows what the model will see, without running it."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFont

from edge_runtime.inputs.clips import Chosen
from edge_runtime.inputs.video.frame_choice import clock

SHEET = 1440  # pixels across
STRIP = 480  # pixels across a group, at most
THUMB = 160  # pixels across a frame, at most
LABEL = 16  # pixels below each frame, for its time
GAP = 10
PAPER, INK, FRAME = "white", "black", (60, 110, 200)


def draw_storyboard(chosen: Chosen, watch: Callable[[float], None] = lambda share: None) -> Image.Image:
    """Draw the chosen frames: a frame around each group, a time below each picture.

    Parameters
    ----------
    watch : called with the finished share; what it raises ends the work.

    Raises
    ------
    VideoError
        When a frame cannot be decoded.
    """
    source, groups, times = chosen.source, chosen.groups, chosen.times_s
    most = max(map(len, groups))
    width = min(THUMB, STRIP // most)
    height = max(1, round(width * source.size[1] / source.size[0]))
    step_x, step_y = most * width + GAP, height + LABEL + GAP
    columns = max(1, min(len(groups), (SHEET - GAP) // step_x))
    sheet = Image.new("RGB", (columns * step_x + GAP, -(-len(groups) // columns) * step_y + GAP), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    n_frames, done = len(chosen.choice.indices), 0
    cursor = source.open()
    try:
        for number, group in enumerate(groups):
            x, y = GAP + number % columns * step_x, GAP + number // columns * step_y
            for i, index in enumerate(group):
                picture = cursor.read(index, lambda share: watch(done / n_frames))  # noqa: B023 - called in here only
                sheet.paste(picture.resize((width, height)), (x + i * width, y))
                pen.text((x + i * width + 3, y + height + 2), clock(times[number][i]), INK, font)
                done += 1
                watch(done / n_frames)
            pen.rectangle((x - 1, y - 1, x + len(group) * width, y + height + LABEL), outline=FRAME)
    finally:
        cursor.close()
    return sheet
