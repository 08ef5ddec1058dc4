"""Positions, tower and resampler against the goldens, and against each other where no golden exists."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from conftest import golden
from edge_kernels.reference import operations as reference
from edge_runtime import Model
from edge_runtime.vision.resampler import pos2d_table, time_embedding
from edge_runtime.vision.sine_positions import frequencies
from edge_runtime.vision.tower import offsets_of, position_buckets, position_ids
from tolerances import RESAMPLER, SINE, SINE_FAR, VISION

NAMES = ["tiny", "square", "wide", "large", "strip", "edge"]


def test_buckets_equal_the_goldens():
    table = golden("buckets")["table"]
    for n in range(1, len(table)):
        np.testing.assert_array_equal(position_buckets(n, 70), table[n, :n], err_msg=f"{n} patches")


def test_position_ids_are_row_major():
    ids = position_ids(3, 5, 70).reshape(3, 5)
    assert (ids // 70 == position_buckets(3, 70)[:, None]).all()
    assert (ids % 70 == position_buckets(5, 70)[None]).all()


@pytest.mark.parametrize("dim", [256, 4096])
def test_sine_tables_equal_the_goldens(dim):
    want = golden("posembed")
    for (row, col), embedding in zip(want["points"].tolist(), want[f"pos2d_{dim}"], strict=True):
        got = pos2d_table(dim, row + 1, col + 1)[-1]
        np.testing.assert_allclose(got, embedding, rtol=0, atol=SINE, err_msg=f"row {row}, column {col}")
    for time, embedding in zip(want["times"].tolist(), want[f"time_{dim}"], strict=True):
        limit = SINE if time < 100 else SINE_FAR
        np.testing.assert_allclose(time_embedding(dim, time), embedding, rtol=0, atol=limit, err_msg=f"time {time}")


def test_no_time_is_zeros():
    assert not time_embedding(64, -1).any()
    assert time_embedding(64, 0)[32:].all()  # time 0 is a time: its cosines are ones


@pytest.mark.parametrize("n", [1, 2, 3, 48, 64, 100, 1024, 2048])
def test_frequencies_are_within_two_units_of_the_formula(n):
    """SVML's power is good to one unit, and the reciprocal rounds once more."""
    got = frequencies(n).astype(np.float64)
    exponents = (np.arange(n, dtype=np.float32) / np.float32(n)).astype(np.float64)
    want = 10000.0**-exponents
    np.testing.assert_array_less(np.abs(got - want) / np.spacing(want.astype(np.float32)), 2.5)


@pytest.mark.parametrize("name", NAMES)
def test_tower_and_resampler_equal_the_goldens(exact_model: Model, images: dict[str, Path], name):
    want = golden(f"image_{name}")
    features, tokens = exact_model.vision_features(images[name]), exact_model.encode_image(images[name])
    assert len(features) == len(tokens) == len(want["vis"])
    for i, (rows, vis) in enumerate(zip(want["vis_rows"], want["vis"], strict=True)):
        np.testing.assert_allclose(features[i][rows], vis, rtol=0, atol=VISION, err_msg=f"slice {i}")
    if "vis_full" in want:
        np.testing.assert_allclose(features[0], want["vis_full"], rtol=0, atol=VISION)
    for k, i in enumerate(want["res_slices"].tolist()):
        np.testing.assert_allclose(tokens[i], want["res"][k], rtol=0, atol=RESAMPLER, err_msg=f"slice {i}")


def test_packed_frames_equal_the_goldens(exact_model: Model, images: dict[str, Path]):
    want = golden("video_pack3")
    cuts = np.split(want["temporal_flat"], np.cumsum(want["group_lengths"])[:-1])
    groups = [ids.tolist() for ids in cuts]
    tokens = exact_model.encode_video([images[f"video_pack3_{i}"] for i in range(9)], groups)
    assert len(tokens) == len(want["res_stats"])
    for got, expected in zip(tokens, want["res"], strict=False):
        np.testing.assert_allclose(got, expected, rtol=0, atol=RESAMPLER)


def naive_resample(model: Model, frames, ids) -> np.ndarray:
    """One group by the formula, frame after frame, in plain NumPy."""
    resampler = model.engine.encoder.resampler
    file, config = resampler._file, resampler.config

    def array(name: str) -> np.ndarray:
        return file.array(f"resampler.{name}")

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return reference.layer_norm(x, array(f"{name}.weight"), array(f"{name}.bias"), config.epsilon)

    def project(x: np.ndarray, name: str) -> np.ndarray:
        return reference.linear(x, array(f"attn.{name}.weight"), array(f"attn.{name}.bias"))

    keys, values = [], []
    for (features, size), time in zip(frames, ids, strict=True):
        value = norm(reference.linear(features, array("kv.weight"), None), "ln_kv")
        values.append(value)
        keys.append(value + pos2d_table(config.hidden, *size) + time_embedding(config.hidden, time))
    q, k, v = (
        project(x, name)
        for x, name in (
            (norm(array("query"), "ln_q"), "q"),
            (np.concatenate(keys), "k"),
            (np.concatenate(values), "v"),
        )
    )
    heads = config.heads
    scale = 1 / math.sqrt(config.hidden / heads)
    out = reference.attention(q, k, v, heads, scale, offsets_of([len(q)]), offsets_of([len(k)]))
    return norm(project(out, "out"), "ln_post") @ array("proj.weight").T


@pytest.mark.parametrize(
    "ids", [[0, 7, 21, 400, 401, 9000], [3], [-1, 12]], ids=["six", "left-over", "still and time"]
)
def test_groups_of_any_length_follow_the_formula(exact_model: Model, images: dict[str, Path], ids):
    """Groups of 6, a left-over single frame, and a still picture beside a timed one: no golden has these."""
    paths = [images[f"video_pack3_{i}"] for i in range(len(ids))]
    frames = [(exact_model.vision_features(path, 1)[0], exact_model.slices(path, 1)[0].tgt_size) for path in paths]
    (tokens,) = exact_model.encode_video(paths, [ids])
    np.testing.assert_allclose(tokens, naive_resample(exact_model, frames, ids), rtol=0, atol=RESAMPLER)


def test_sliced_frames_are_grouped_slice_by_slice(exact_model: Model, images: dict[str, Path]):
    """Two frames of 1 + 2 slices give 3 groups; each holds the same slice of both frames."""
    ids = [4, 9]
    paths = [images["wide"], images["wide"]]
    tokens = exact_model.encode_video(paths, [ids], max_slices=2)
    features, sizes = exact_model.vision_features(paths[0], 2), [s.tgt_size for s in exact_model.slices(paths[0], 2)]
    assert len(tokens) == len(features) == 3
    for j, got in enumerate(tokens):
        want = naive_resample(exact_model, [(features[j], sizes[j])] * 2, ids)
        np.testing.assert_allclose(got, want, rtol=0, atol=RESAMPLER, err_msg=f"slice {j}")


def test_order_inside_a_group_does_not_matter(exact_model: Model, images: dict[str, Path]):
    paths = [images[f"video_pack3_{i}"] for i in range(3)]
    (forward,) = exact_model.encode_video(paths, [[1, 2, 3]])
    (backward,) = exact_model.encode_video(paths[::-1], [[3, 2, 1]])
    np.testing.assert_allclose(forward, backward, rtol=0, atol=RESAMPLER)


def test_batches_change_nothing(exact_model: Model, images: dict[str, Path], monkeypatch):
    together = exact_model.encode_image(images["strip"])
    monkeypatch.setattr("edge_runtime.vision.encoder.BATCH_PATCHES", 1)
    for a, b in zip(together, exact_model.encode_image(images["strip"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=VISION / 10)
