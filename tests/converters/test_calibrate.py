"""`--calibrate`: factors and exceptions that the int8 path needs where a few hidden units dwarf the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from checkpoint_copies import CheckpointCopy, stored
from edge_converters import convert_checkpoint
from edge_converters.calibration import smoothing as calibrate
from edge_converters.calibration.smoothing import best_factor
from edge_runtime import CheckpointError, Model, ModelFileError
from edge_runtime.vision.calibration import KEY_FLOAT_PRODUCTS, SMOOTH_PREFIX
from edge_runtime.weights.gguf_file import GGUFFile
from mtmd_peer import encode_with_mtmd

UNITS, LARGER = 5, 30.0


@pytest.fixture(scope="module")
def planted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with hidden units 30 times larger in every MLP, and what reads them as much smaller."""
    copy = CheckpointCopy.of(checkpoint)
    for name, tensor in copy.tensors.items():
        if ".mlp.fc1." in name and name.startswith("vpm."):
            values = tensor.values.copy()
            values[:UNITS] *= LARGER
        elif name.endswith(".mlp.fc2.weight") and name.startswith("vpm."):
            values = tensor.values.copy()
            values[:, :UNITS] /= LARGER
        else:
            continue
        copy.tensors[name] = stored(values)
    return copy.write(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures that are none of those asked about, a broken one and something else."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(3)
    for number in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        coarse.resize((240 + 40 * number, 200), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def folders(planted: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The planted checkpoint converted without and with calibration."""
    plain, calibrated = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("calibrated")
    convert_checkpoint(planted, plain, decoder_type="f32", vision_type="f32")
    convert_checkpoint(planted, calibrated, decoder_type="f32", vision_type="f32", pictures=pictures)
    return plain, calibrated


def features(folder: Path, picture: Path, *, exact: bool = False) -> np.ndarray:
    with Model.load(folder, exact=exact) as model:
        return np.concatenate([*model.vision_features(picture)])


def cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x.astype(np.float64), y.astype(np.float64)
    return (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)


def test_factors_undo_what_large_hidden_units_cost(folders, images):
    plain, calibrated = folders
    reference = features(plain, images["wide"], exact=True)
    before = cosines(features(plain, images["wide"]), reference)
    after = cosines(features(calibrated, images["wide"]), reference)
    assert before.mean() < 0.999, "the planted units do no harm: the test tests nothing"
    assert after.mean() > 0.9995
    assert after.min() > 0.999


def test_the_exact_path_and_llama_cpp_see_the_same_model(folders, images):
    plain, calibrated = folders
    np.testing.assert_array_equal(
        features(calibrated, images["wide"], exact=True), features(plain, images["wide"], exact=True)
    )
    rgb = np.asarray(Image.open(images["square"]).convert("RGB"))
    one, other = (
        encode_with_mtmd(folder / "ggml-model-F32.gguf", folder / "mmproj-model-f32.gguf", rgb)
        for folder in (plain, calibrated)
    )
    np.testing.assert_array_equal(one, other)


def test_factors_are_in_the_file_for_the_products_that_need_them(folders):
    plain, calibrated = (GGUFFile(folder / "mmproj-model-f32.gguf") for folder in folders)
    found = {name.removeprefix(SMOOTH_PREFIX) for name in calibrated.tensors if name.startswith(SMOOTH_PREFIX)}
    assert found >= {f"v.blk.{n}.ffn_up" for n in range(3)}  # fc2, by llama.cpp's name for MiniCPM-V
    assert set(calibrated.tensors) - set(plain.tensors) == {SMOOTH_PREFIX + name for name in found}
    factor = calibrated.array(f"{SMOOTH_PREFIX}v.blk.0.ffn_up")
    assert factor[:UNITS].min() > 5 * np.median(factor)


def test_products_that_stay_bad_remain_in_float(planted, pictures, tmp_path, monkeypatch, images):
    monkeypatch.setattr(calibrate, "WORST_ERROR", 0.0)
    convert_checkpoint(planted, tmp_path, decoder_type="f32", vision_type="f32", pictures=pictures)
    names = GGUFFile(tmp_path / "mmproj-model-f32.gguf").strings(KEY_FLOAT_PRODUCTS)
    assert {"v.blk.0.attn_out", "v.blk.0.ffn_up", "resampler.kv"} <= set(names)
    reference = features(tmp_path, images["wide"], exact=True)
    assert cosines(features(tmp_path, images["wide"]), reference).min() > 0.9995


def test_ordinary_products_get_no_factors():
    rng = np.random.default_rng(0)
    weight, rows = (rng.standard_normal(shape).astype(np.float32) for shape in ((40, 128), (64, 128)))
    factor, error = best_factor(weight, rows, np.abs(rows).max(axis=0))
    assert factor is None
    assert 0 < error < calibrate.WORST_ERROR


def test_columns_of_zeros_are_no_trouble():
    rng = np.random.default_rng(0)
    weight, rows = (rng.standard_normal(shape).astype(np.float32) for shape in ((40, 64), (64, 64)))
    rows[:, 3], rows[:, 5], weight[:, 7] = 0, 300 * rows[:, 5], 0
    factor, error = best_factor(weight, rows, np.abs(rows).max(axis=0))
    assert factor is not None
    assert np.isfinite(factor).all()
    assert 0 < error < calibrate.WORST_ERROR


@pytest.mark.parametrize("content", [{}, {"notes.txt": b"x"}, {"broken.png": b"\x89PNG"}], ids=str)
def test_a_folder_without_pictures_is_refused_and_leaves_no_file(checkpoint, tmp_path, content):
    (tmp_path / "pictures").mkdir()
    for name, data in content.items():
        (tmp_path / "pictures" / name).write_bytes(data)
    with pytest.raises(CheckpointError, match="holds no picture"):
        convert_checkpoint(checkpoint, tmp_path / "out", pictures=tmp_path / "pictures")
    with pytest.raises(CheckpointError, match="is no folder"):
        convert_checkpoint(checkpoint, tmp_path / "out", pictures=tmp_path / "missing")
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_file()]


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_factors_that_are_not_positive_are_refused(folders, tmp_path, value):
    for path in folders[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "mmproj-model-f32.gguf"
    with path.open("rb+") as file:
        file.seek(GGUFFile(path).tensors[f"{SMOOTH_PREFIX}v.blk.1.ffn_up"].offset)
        file.write(np.float32(value).tobytes())
    with pytest.raises(ModelFileError, match="not positive"):
        Model.load(tmp_path)
