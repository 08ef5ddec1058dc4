"""Slice plans and slices: compared with the goldens and the definition's table; properties for every size."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import golden
from edge_runtime import Model
from edge_runtime.inputs.slicing import plan_slices, slice_image
from edge_runtime.weights.config import SlicingConfig
from tolerances import PIXELS

OFFICIAL = SlicingConfig(448, 14, 9, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# width, height → grid, overview, cell: the cases where other runtimes go wrong are all in here.
KNOWN = [
    (20, 30, (0, 0), (364, 546), (0, 0)),
    (224, 224, (0, 0), (448, 448), (0, 0)),
    (449, 448, (2, 1), (448, 448), (322, 630)),
    (700, 280, (0, 0), (700, 280), (0, 0)),  # 707 / 14 is 50.5: the tie goes to the even 50
    (640, 480, (2, 1), (518, 392), (364, 546)),
    (1000, 600, (2, 1), (574, 350), (406, 490)),
    (1280, 720, (3, 2), (602, 336), (490, 406)),
    (1344, 1344, (3, 3), (448, 448), (448, 448)),
    (1920, 1080, (4, 2), (602, 336), (420, 476)),
    (3024, 4032, (3, 3), (392, 518), (392, 518)),
    (200, 2000, (1, 3), (140, 1414), (252, 812)),
    (50, 2000, (0, 0), (70, 2828), (0, 0)),
    (10000, 10, (0, 0), (14000, 14), (0, 0)),
]


@pytest.mark.parametrize(("width", "height", "grid", "source", "cell"), KNOWN)
def test_known_plans(width, height, grid, source, cell):
    plan = plan_slices(width, height, OFFICIAL)
    assert (plan.grid, plan.source, plan.cell) == (grid, source, cell)
    assert plan.refine == (cell[0] * grid[0], cell[1] * grid[1])


def test_plans_equal_the_goldens():
    for width, height, limit, *want in golden("plan")["table"].tolist():
        plan = plan_slices(width, height, OFFICIAL, limit)
        assert [*plan.grid, *plan.source, *plan.refine, *plan.cell] == want, (width, height, limit)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 20))
def test_every_plan_is_whole_patches_within_the_limit(width, height, limit):
    plan = plan_slices(width, height, OFFICIAL, limit)
    assert plan.n_slices - 1 <= limit
    assert plan.n_slices != 2  # one cell would be the overview again
    for w, h in plan.sizes:
        assert w >= 14
        assert h >= 14
        assert (w % 14, h % 14) == (0, 0)


@pytest.mark.parametrize("name", ["tiny", "square", "wide", "large", "strip", "edge"])
def test_slices_equal_the_goldens_to_the_byte(exact_model: Model, images: dict[str, Path], name):
    want = golden(f"image_{name}")
    slices = exact_model.slices(images[name])
    assert [s.tgt_size for s in slices] == [tuple(size) for size in want["tgt_sizes"].tolist()]
    for i, item in enumerate(slices):
        assert hashlib.sha256(np.ascontiguousarray(item.pixels).tobytes()).hexdigest() == str(want["u8_sha256"][i])
        middle = int(want["px_mid_index"][i])
        for patch, golden_patch in ((0, want["px_first"][i]), (middle, want["px_mid"][i])):
            np.testing.assert_allclose(item.patches[patch], golden_patch, rtol=0, atol=PIXELS)
            columns = slice(14 * patch, 14 * patch + 14)
            np.testing.assert_array_equal(item.pixel_values()[:, :, columns], item.patches[patch])


def test_cells_come_row_by_row():
    """Each cell of a picture whose four quarters have one colour each shows the colour of its place."""
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    picture = Image.new("RGB", (800, 800))
    for i, colour in enumerate(colours):
        picture.paste(colour, (400 * (i % 2), 400 * (i // 2), 400 * (i % 2) + 400, 400 * (i // 2) + 400))
    slices = slice_image(picture, plan_slices(800, 800, OFFICIAL, 4), OFFICIAL)
    assert len(slices) == 5
    for cell, colour in zip(slices[1:], colours, strict=True):
        middle = cell.pixels[cell.pixels.shape[0] // 2, cell.pixels.shape[1] // 2]
        np.testing.assert_allclose(middle, colour, atol=1)


def test_columns_are_resized_before_rows():
    """Pillow 13 would start with the rows here, which gives other bytes; the official version never does."""
    rng = np.random.default_rng(5)
    picture = Image.fromarray(rng.integers(0, 256, (1500, 460, 3), dtype=np.uint8))
    plan = plan_slices(460, 1500, OFFICIAL, 1)
    assert 1500 - plan.source[1] > 2 * (460 - plan.source[0])
    want = picture.resize((plan.source[0], 1500), Image.Resampling.BICUBIC).resize(
        plan.source, Image.Resampling.BICUBIC
    )
    np.testing.assert_array_equal(slice_image(picture, plan, OFFICIAL)[0].pixels, np.asarray(want))
