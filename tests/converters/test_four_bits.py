"""The vision part in four bits: which scales are chosen, rows that do not fill their blocks, who reads it."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Type
from gguf import quants as gguf_quants
from PIL import Image

import mtmd_peer
from checkpoint_copies import CheckpointCopy, stored
from edge_converters import VISION_TYPES, convert_checkpoint
from edge_converters.convert import Converted
from edge_converters.plan.encode_rows import encode_rows
from edge_converters.plan.tensors import plan_vision
from edge_converters.sources.checkpoint import Checkpoint
from edge_runtime import Model
from edge_runtime.cli.program import main
from edge_runtime.decoder import llama_cpp as llama
from edge_runtime.vision.tower import position_ids
from edge_runtime.weights.gguf_file import GGUFFile
from naive import NaiveModel, random_tensors, write_safetensors
from tolerances import RESAMPLER, VISION

N_LAYERS = 3
# Weights err by 8 % of their RMS (see `test_decoder_types`), which is the angle of one product; 3 layers of 4
# products in series on a residual stream: measured 0.970 at worst, 0.992 on average.
FOUR_BIT_COSINE = 0.96
FOUR_BIT_MEAN_COSINE = 0.99


def weighted_error(values: np.ndarray, blocks: np.ndarray, importance: np.ndarray) -> float:
    """RMS error of blocks over RMS value, columns weighted."""
    difference = gguf_quants.dequantize(blocks, Type.Q4_0) - values
    return float(np.sqrt((importance * difference**2).sum() / (importance * values**2).sum()))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


# --- which scales are chosen -----------------------------------------------------------------------------------


def test_searched_scales_err_less() -> None:
    """5 % less where all columns count alike, a quarter less where some count fifty times as much as others."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((64, 1024)).astype(np.float32)
    plain = encode_rows(values, Type.Q4_0)
    for importance, gain in ((np.ones(1024), 0.97), (np.exp(2 * rng.standard_normal(1024)), 0.8)):
        searched = encode_rows(values, Type.Q4_0, importance.astype(np.float32))
        assert weighted_error(values, searched, importance) < gain * weighted_error(values, plain, importance)


NORMS = {  # GGUF name of a matrix → the norm before it, in the checkpoint
    **{
        f"v.blk.{n}.{part}.weight": f"vpm.encoder.layers.{n}.layer_norm{norm}"
        for n in range(N_LAYERS)
        for part, norm in (("attn_q", 1), ("attn_k", 1), ("attn_v", 1), ("ffn_down", 2))
    },
    "resampler.attn.q.weight": "resampler.ln_q",
    "resampler.attn.k.weight": "resampler.ln_kv",
}


@pytest.mark.parametrize("kind", ["q4_0", "int4"])
def test_columns_count_as_much_as_what_they_are_multiplied_by(
    copy: CheckpointCopy, tmp_path: Path, kind: str
) -> None:
    """Other numbers in every norm, so that none can be taken for another."""
    rng = np.random.default_rng(5)
    for norm in set(NORMS.values()):
        for part in ("weight", "bias"):
            shape = copy.tensors[f"{norm}.{part}"].shape
            copy.tensors[f"{norm}.{part}"] = stored(rng.uniform(0.5, 2, shape).astype(np.float32))
    weighted = {}
    for tensor in plan_vision(Checkpoint(copy.write(tmp_path)), VISION_TYPES[kind]):
        if tensor.type == Type.Q4_0 and tensor.name != "resampler.pos_embed_k":
            assert tensor.importance is not None, tensor.name
            weighted[tensor.name] = tensor.importance()
        elif tensor.type != Type.Q4_0:
            assert tensor.importance is None, tensor.name
    assert set(NORMS) < set(weighted)
    for name, importance in weighted.items():
        expected = np.ones(len(importance))
        if name in NORMS:
            expected = sum(copy.tensors[f"{NORMS[name]}.{part}"].values ** 2 for part in ("weight", "bias"))
        if name == "resampler.attn.k.weight":  # its input has positions added: sines and cosines
            assert np.all(importance > expected)
            assert np.mean(importance - expected) == pytest.approx(0.5, abs=1e-3)
        else:
            np.testing.assert_allclose(importance, expected, rtol=1e-6, err_msg=name)


def test_columns_that_no_input_reaches_keep_their_values(copy: CheckpointCopy, tmp_path: Path) -> None:
    """A norm may shut whole blocks of columns off; a search that finds them free would write zeros."""
    for norm, open_columns in (("vpm.encoder.layers.0.layer_norm1", 1), ("vpm.encoder.layers.1.layer_norm1", 0)):
        for part in ("weight", "bias"):
            values = np.zeros(160, np.float32)
            values[:open_columns] = 1
            copy.tensors[f"{norm}.{part}"] = stored(values)
    files = convert_checkpoint(copy.write(tmp_path / "copy"), tmp_path, decoder_type="q8_0", vision_type="int4")
    for n in (0, 1):
        expected = copy.tensors[f"vpm.encoder.layers.{n}.self_attn.q_proj.weight"].values
        difference = GGUFFile(files.mmproj).array(f"v.blk.{n}.attn_q.weight") - expected
        assert np.sqrt(np.mean(difference[:, 32:] ** 2) / np.mean(expected**2)) < 0.1


# --- rows that do not fill their blocks ------------------------------------------------------------------------


def test_padded_rows_are_longer_in_the_file_alone(converted: Callable[[str, str], Converted]) -> None:
    file = GGUFFile(converted("f32", "int4").mmproj)
    for n in range(N_LAYERS):
        name = f"v.blk.{n}.ffn_up.weight"
        assert file.tensor(name).shape == file.array(name).shape == (160, 304)
        assert file.blocks(name).shape == (160, 320 // 32 * 18)
        assert not gguf_quants.dequantize(file.blocks(name), Type.Q4_0)[:, 304:].any()
        assert np.array_equal(file.array(name), gguf_quants.dequantize(file.blocks(name), Type.Q4_0)[:, :304])


SIZES = [(72, 200), (64, 320), (96, 33)]  # width, mlp: both padded, neither, mlp one value beyond a block


@pytest.mark.parametrize(("width", "mlp"), SIZES)
def test_other_sizes_follow_the_definition(checkpoint: Path, tmp_path: Path, width: int, mlp: int) -> None:
    """Our tower and resampler on an int4 file, against their definition with the file's weights."""
    changes = {"hidden_size": 128, "query_num": 24, "num_hidden_layers": 1, "patch_size": 10}
    vision = {"hidden_size": width, "intermediate_size": mlp, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = json.loads((checkpoint / "config.json").read_text()) | changes
    config |= {"vision_config": {**vision, "image_size": 330, "patch_size": 10}, "head_dim": 64}
    for path in checkpoint.iterdir():
        if "safetensors" not in path.name:
            shutil.copy(path, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = {"max_slice_nums": 2, "scale_resolution": 120, "patch_size": 10}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    tensors = random_tensors(config, seed=width)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    files = convert_checkpoint(tmp_path, tmp_path / "gguf", decoder_type="f32", vision_type="int4")
    file = GGUFFile(files.mmproj)
    paddings = {info.name.split(".")[-2]: info.padding for info in file.tensors.values() if info.padding}
    assert paddings.get("ffn_up", 0) == -mlp % 32
    assert paddings.get("attn_q", 0) == paddings.get("kv", 0) == -width % 32
    naive = NaiveModel(config, tensors | stored_weights(file))
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 200, 3), dtype=np.uint8))
    with Model.load(tmp_path / "gguf", exact=True) as model:
        slices, features = model.slices(picture), model.vision_features(picture)
        for item, got, tokens in zip(slices, features, model.encode_image(picture), strict=True):
            want = naive.vision(item.patches.astype(np.float64), position_ids(*item.tgt_size, 33))
            np.testing.assert_allclose(got, want, rtol=0, atol=VISION)
            np.testing.assert_allclose(tokens, naive.resample(want, *item.tgt_size), rtol=0, atol=RESAMPLER)
            exact = NaiveModel(config, tensors).vision(
                item.patches.astype(np.float64), position_ids(*item.tgt_size, 33)
            )
            assert np.abs(want - exact).max() > 10 * VISION, "the weights are those of the checkpoint: nothing tested"


def stored_weights(file: GGUFFile) -> dict[str, np.ndarray]:
    """What an mmproj file holds, under the names of the checkpoint, as far as its types round anything."""
    weights = {
        "vpm.embeddings.patch_embedding.weight": file.array("v.patch_embd.weight"),
        "vpm.embeddings.position_embedding.weight": file.array("v.position_embd.weight"),
        "resampler.kv_proj.weight": file.array("resampler.kv.weight"),
        "resampler.attn.out_proj.weight": file.array("resampler.attn.out.weight"),
        "resampler.proj": file.array("resampler.proj.weight").T,
        "resampler.attn.in_proj_weight": np.concatenate(
            [file.array(f"resampler.attn.{letter}.weight") for letter in "qkv"]
        ),
    }
    parts = {f"attn_{part}": f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")}
    parts |= {"ffn_down": "mlp.fc1", "ffn_up": "mlp.fc2"}
    for n in range(2):
        for ours, theirs in parts.items():
            weights[f"vpm.encoder.layers.{n}.{theirs}.weight"] = file.array(f"v.blk.{n}.{ours}.weight")
    return weights


@pytest.mark.parametrize("kind", ["q4_0", "int4"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "int8"])
def test_pictures_come_out_as_in_float32(
    converted: Callable[[str, str], Converted], exact_model: Model, images: dict[str, Path], kind: str, exact: bool
) -> None:
    with Model.load(converted("f32", kind).decoder.parent, exact=exact) as model:
        features, tokens = (np.concatenate(f(images["wide"])) for f in (model.vision_features, model.encode_image))
    for ours, theirs in (
        (features, exact_model.vision_features(images["wide"])),
        (tokens, exact_model.encode_image(images["wide"])),
    ):
        cosine = cosines(ours, np.concatenate(theirs))
        assert FOUR_BIT_COSINE < cosine.min() < cosine.max() < 0.99999
        assert cosine.mean() > FOUR_BIT_MEAN_COSINE


# --- who reads it ----------------------------------------------------------------------------------------------


def test_llama_cpp_refuses_int4_with_a_reason(converted: Callable[[str, str], Converted]) -> None:
    """At load, with a sentence; not with an abort in the middle of the first picture."""
    import llama_cpp.mtmd_cpp as mtmd

    lines: list[str] = []
    quiet = mtmd_peer._quiet_log(mtmd)
    listen = llama.library().llama_log_callback(lambda level, text, data: lines.append(text.decode()))
    mtmd.mtmd_log_set(listen, ctypes.c_void_p(0))
    try:
        files = converted("f32", "int4")
        with pytest.raises(AssertionError), mtmd_peer.MtmdPeer(files.decoder, files.mmproj):
            pass
    finally:
        mtmd.mtmd_log_set(quiet, ctypes.c_void_p(0))
    assert "unknown projector type: edge_runtime.resampler" in "".join(lines)


@pytest.mark.parametrize(("kind", "readers"), [("q4_0", "llama.cpp too"), ("int4", "edge-runtime alone")])
def test_info_says_what_is_in_the_file(converted: Callable[[str, str], Converted], kind: str, readers: str) -> None:
    path = converted("f32", kind).mmproj
    result = CliRunner().invoke(main, ["info", str(path), "--json"])
    facts = json.loads(result.stdout)
    assert facts["mmproj for"] == readers
    infos = GGUFFile(path).tensors.values()
    assert set(facts["mmproj types"]) == {"Q4_0", "Q8_0", "F16", "F32"}
    n_bytes = sum(info.n_bytes for info in infos if info.type == Type.Q4_0)
    assert facts["mmproj types"]["Q4_0"] == f"{n_bytes / 1e6:.1f} MB"
    parameters = sum(info.n_elements for info in infos)
    assert facts["mmproj parameters"] == f"{parameters / 1e6:.2f} M"
    assert parameters == sum(GGUFFile(path).array(info.name).size for info in infos), "padding is no parameter"
