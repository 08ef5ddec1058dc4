"""The generator of the demo model: the same for one seed, right by construction, held-out things held out."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest

from demo import data, things
from demo.draw import (
    COLORS,
    SHAPES,
    TEST_FONTS,
    TEST_HUES,
    TRAIN_FONTS,
    available,
    largest_size,
    load_font,
    random_color,
    text_box,
)
from demo.words import TEST_WORDS, TRAIN_WORDS, is_test_word
from edge_runtime.inputs.slicing import plan_slices

DRAWABLE = [kind for kind in data.KINDS if kind != "unseen fonts" or available(TEST_FONTS)]


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", DRAWABLE)
def test_one_seed_gives_one_sample(kind: str) -> None:
    first, second, other = (data.KINDS[kind](rng(seed)) for seed in (3, 3, 4))
    assert [p.tobytes() for p in first.pictures] == [p.tobytes() for p in second.pictures]
    assert (first.question, first.answer, first.temporal_ids) == (second.question, second.answer, second.temporal_ids)
    assert [p.tobytes() for p in first.pictures] != [p.tobytes() for p in other.pictures]


def test_training_and_test_words_are_disjoint() -> None:
    assert TEST_WORDS
    assert not set(TEST_WORDS) & set(TRAIN_WORDS)
    assert {len(word) for word in TEST_WORDS} == {2, 3, 4, 5, 6}


def test_training_and_test_fonts_are_disjoint() -> None:
    assert not set(TEST_FONTS) & set(TRAIN_FONTS)
    assert available(TRAIN_FONTS)


@pytest.mark.parametrize("length", [3, 4, 5, 6])
def test_random_strings_keep_to_their_split(length: int) -> None:
    source = rng(length)
    assert not any(is_test_word(data.random_text(source, length, test=False)) for _ in range(200))
    assert all(is_test_word(data.random_text(source, length, test=True)) for _ in range(200))


def test_mixed_strings_have_no_ambiguous_glyphs() -> None:
    source = rng(1)
    for _ in range(500):
        text = data.random_text(source, 5, test=False)
        if re.search("[0-9]", text) and re.search("[A-Z]", text):
            assert not re.search("[OI01]", text), text


def test_training_colours_avoid_the_test_hues() -> None:
    import colorsys

    source = rng(2)
    for _ in range(500):
        hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in random_color(source, test=False)))
        if saturation * value * 255 < 40:  # 8-bit rounding moves the hue of greys and darks
            continue
        assert not any(low + 0.01 < hue < high - 0.01 for low, high in TEST_HUES)


def test_text_fits_and_can_be_read() -> None:
    source, drawn = rng(3), 0
    for _ in range(300):
        size = data.still_size(source)
        sample = data.text_sample(source, size)
        if sample is None:
            continue
        drawn += 1
        (picture,) = sample.pictures
        pixels = np.asarray(picture).astype(int)
        assert np.ptp(pixels @ [299, 587, 114]) > 80_000  # text and ground differ in luma
    assert drawn > 150


def test_largest_size_fits() -> None:
    for font in available(TRAIN_FONTS)[:3]:
        size = largest_size("HAMMER", font, 100, 50)
        left, top, right, bottom = text_box("HAMMER", font, size)
        assert right - left <= 103
        assert bottom - top <= 52
        assert load_font(font, size) is load_font(font, size)


@pytest.mark.parametrize("kind", ["text to 6", "shape", "count", "filter", "video"])
def test_small_pictures_are_not_cut(kind: str) -> None:
    for seed in range(10):
        for picture in data.KINDS[kind](rng(seed)).pictures:
            assert plan_slices(*picture.size, data.SLICING).n_slices == 1


def test_large_pictures_are_cut_and_cannot_be_read_in_the_overview() -> None:
    source = rng(5)
    for _ in range(30):
        size = data.large_size(source)
        plan = plan_slices(*size, data.SLICING)
        assert plan.n_slices > 1
        least, most = data.font_limits(source, size, plan, train=False)
        overview = max(plan.source[0] / size[0], plan.source[1] / size[1])
        assert least <= most <= max(least + 1, data.UNREADABLE_FONT / overview)


def test_aspects_reach_from_1_to_4_to_4_to_1() -> None:
    source = rng(6)
    aspects = [math.log(w / h, 4) for w, h in (data.still_size(source) for _ in range(400))]
    assert min(aspects) < -0.9
    assert max(aspects) > 0.9
    assert max(map(abs, aspects)) <= 1.03


def test_counts_are_those_of_the_things() -> None:
    source, asked = rng(7), Counter()
    for _ in range(300):
        sample = things.count_sample(source, (112, 112), "filter")
        if sample is None:
            continue
        for i, shape in enumerate(SHAPES):
            if things.plural(shape) in sample.question:
                assert int(sample.answer) == sample.facts["shapes"][i]
        for i, color in enumerate(COLORS):
            if color in sample.question:
                assert int(sample.answer) == sample.facts["colors"][i]
        assert int(sample.answer) < sample.facts["total"][0] <= 6  # there is always another kind
        asked[sample.answer] += 1
    assert set(asked) == set("12345")


def test_plain_counts_reach_from_one_to_six() -> None:
    source = rng(8)
    samples = [things.count_sample(source, (112, 112)) for _ in range(200)]
    assert {s.answer for s in samples if s} == set("123456")
    assert all(int(s.answer) == s.facts["total"][0] for s in samples if s)


def test_plurals() -> None:
    assert [things.plural(shape) for shape in SHAPES] == ["circles", "squares", "triangles", "stars", "crosses"]
    assert things.article("orange star") == "an orange star"


@pytest.mark.parametrize("kind", ["shape", "absent", "relation", "followup"])
def test_answers_about_things_follow_from_them(kind: str) -> None:
    source = rng(9)
    for _ in range(100):
        sample = things.shape_sample(source, (120, 100), kind)
        if sample is None:
            continue
        shapes = [shape for shape, n in zip(SHAPES, sample.facts["shapes"], strict=True) if n]
        colors = [color for color, n in zip(COLORS, sample.facts["colors"], strict=True) if n]
        if sample.answer.startswith("There is no"):
            assert not any(shape in sample.answer for shape in shapes)
        elif sample.answer in SHAPES:
            assert sample.answer in shapes
        elif sample.answer in COLORS:
            assert sample.answer in colors


def _centre(picture: object) -> np.ndarray:
    pixels = np.asarray(picture).astype(int)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    far = np.abs(pixels - ground).sum(axis=2) > 120
    return np.argwhere(far).mean(axis=0)[::-1]


def test_the_ball_moves_the_way_the_answer_says() -> None:
    checked = 0
    for seed in range(60):
        sample = things.video_sample(rng(10, seed), (112, 112), 3)
        assert sample is not None
        assert sample.temporal_ids == sorted(sample.temporal_ids)
        assert len(set(sample.temporal_ids)) > 1
        first_x, first_y, last_x, last_y = sample.facts["track"]
        dx, dy = things.DIRECTIONS[sample.answer]
        assert (last_x - first_x) * dx + (last_y - first_y) * dy > 0
        moved = _centre(sample.pictures[-1]) - _centre(sample.pictures[0])
        if np.isfinite(moved).all() and np.abs(moved).max() > 25:  # noise and gradients hide some from this look
            checked += 1
            assert moved @ (dx, dy) > 0
    assert checked > 20


def test_videos_start_anywhere() -> None:
    source = rng(11)
    starts = [things.video_sample(source, (112, 112), 2).temporal_ids[0] for _ in range(300)]
    assert min(starts) < 60
    assert max(starts) > 1700
    assert max(starts) <= things.MAX_START + 1


def test_messages_are_those_of_the_runtime() -> None:
    from edge_runtime.inputs.messages import parse_messages

    sample = data.KINDS["followup"](rng(12))
    assert [m.role for m in parse_messages(sample.messages())] == ["user", "assistant", "user"]
    assert data.KINDS["video"](rng(12)).options()["use_image_id"] is False


@pytest.mark.skipif(not available(TEST_FONTS), reason="the held-out fonts are not installed")
def test_the_sheet_shows_every_kind() -> None:
    sheet = data.draw_sheet(seed=0, columns=1)
    assert sheet.size == (200, 160 * len(data.KINDS))


def test_marks_lie_on_what_they_name() -> None:
    from demo.batches import name_patches

    sample = None
    source = rng(13)
    while sample is None or len(sample.answer) < 4:
        sample = data.text_sample(source, (112, 112))
    named = name_patches(sample.marks["character"], "character", 8, 8)
    inked = {int(code) for code in named.ravel()} - {36}
    assert inked <= {data.CHARACTERS.index(c) for c in sample.answer}
    assert data.CHARACTERS.index(sample.answer[0]) in inked
    centres = [mark.left + mark.right for mark in sample.marks["character"]]
    assert centres == sorted(centres)


def test_large_pictures_are_named_in_their_cells() -> None:
    from demo.batches import BatchMaker

    batch = BatchMaker(seed=1).make(0, {"slices": 1.0})
    part, named = batch.named["character"]
    assert part == 1
    assert named.shape == batch.parts[1][0].shape[:3]
    assert (named < 36).any(axis=(1, 2)).all()  # every line is somewhere
