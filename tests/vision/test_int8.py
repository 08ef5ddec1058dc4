"""The default vision path: int8 products against the exact path, also where channels differ a hundredfold."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import Model
from edge_runtime.weights.gguf_file import GGUFFile

# Rounding rows and weights to 8 bits costs one product about 1 % (a step of 1/127 of a range of 8 standard
# deviations, uniform error, both sides), which is a cosine of 0.99995; three layers of them and the resampler add up
# to 0.9996 at the worst row measured. Half again as much is a fault.
WORST, MEAN = 0.9994, 0.9997
GAIN = 50.0
PLANTED = 8  # channels


def cosines(a: list[np.ndarray], b: list[np.ndarray]) -> np.ndarray:
    x, y = np.concatenate(a).astype(np.float64), np.concatenate(b).astype(np.float64)
    return (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)


@pytest.fixture(scope="module")
def default_model(exact_folder: Path):
    with Model.load(exact_folder) as model:
        yield model


@pytest.mark.parametrize("name", ["tiny", "square", "wide", "strip"])
@pytest.mark.parametrize("what", ["vision_features", "encode_image"])
def test_int8_stays_close_to_float32(default_model: Model, exact_model: Model, images, name, what):
    found = cosines(getattr(default_model, what)(images[name]), getattr(exact_model, what)(images[name]))
    assert found.min() > WORST
    assert found.mean() > MEAN
    assert found.max() < 1.0  # it is another arithmetic indeed


def grow(vector: np.ndarray) -> np.ndarray:
    return np.r_[vector[:PLANTED] * GAIN, vector[PLANTED:]]


def shrink(weight: np.ndarray) -> np.ndarray:
    return np.c_[weight[:, :PLANTED] / GAIN, weight[:, PLANTED:]]


def plant(path: Path) -> None:
    """Make some channels after both layer norms of every layer 50 times larger, and what reads them as much smaller.

    Nothing changes in float32; quantised row by row without folding, these channels would take the whole range.
    """
    file = GGUFFile(path)
    for n in range(3):
        for norm, readers in (("ln1", ("attn_q", "attn_k", "attn_v")), ("ln2", ("ffn_down",))):
            for part in ("weight", "bias"):
                write(path, file, f"v.blk.{n}.{norm}.{part}", grow)
            for reader in readers:
                write(path, file, f"v.blk.{n}.{reader}.weight", shrink)


def write(path: Path, file: GGUFFile, name: str, change) -> None:
    changed = change(file.array(name)).astype("<f4")
    with path.open("rb+") as out:
        out.seek(file.tensors[name].offset)
        out.write(changed.tobytes())


def test_large_gains_cost_nothing(exact_folder: Path, exact_model: Model, tmp_path: Path, images):
    for source in exact_folder.iterdir():
        shutil.copy(source, tmp_path)
    plant(tmp_path / "mmproj-model-f32.gguf")
    with Model.load(tmp_path, exact=True) as planted:
        same = planted.vision_features(images["edge"])
        assert cosines(same, exact_model.vision_features(images["edge"])).min() > 1 - 1e-5
    with Model.load(tmp_path) as planted:
        found = cosines(planted.vision_features(images["edge"]), exact_model.vision_features(images["edge"]))
    assert found.min() > WORST
    assert found.mean() > MEAN
