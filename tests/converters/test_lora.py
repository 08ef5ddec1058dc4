"""LoRA folders of PEFT: merged into the weights, or the decoder's part as an adapter for llama.cpp.

What PEFT itself computes with the same folder is in `test_reference_tools.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import quantised_copies as q
from checkpoint_copies import CheckpointCopy, read_shard, shard_bytes, stored
from conftest import golden
from edge_converters import convert_checkpoint
from edge_converters.sources.checkpoint import Checkpoint
from edge_runtime import Model
from edge_runtime.cli.program import main
from edge_runtime.store.find import find_model
from edge_runtime.weights.gguf_file import GGUFFile
from naive import NaiveModel

LOGITS = 1e-3
SCALE = 2.0  # alpha 8, rank 4
LAYER, TOWER = "llm.model.layers.1.", "vpm.encoder.layers.0."
DECODER_PARTS = [
    *(f"llm.model.layers.{n}.self_attn.{part}_proj.weight" for n in range(3) for part in "qkvo"),
    *(f"{LAYER}mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    "llm.lm_head.weight",
]
VISION_PARTS = [f"{TOWER}self_attn.q_proj.weight", f"{TOWER}mlp.fc1.weight", "resampler.kv_proj.weight"]
EXACT = {"decoder_type": "f32", "vision_type": "f32"}


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> CheckpointCopy:
    return CheckpointCopy.of(checkpoint)


@pytest.fixture(scope="module")
def pairs(plain: CheckpointCopy) -> q.Pairs:
    return q.random_lora(plain, DECODER_PARTS + VISION_PARTS)


@pytest.fixture(scope="module")
def lora(pairs: q.Pairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return q.write_lora(tmp_path_factory.mktemp("peft") / "signs", q.lora_tensors(pairs))


@pytest.fixture(scope="module")
def merged(checkpoint: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    convert_checkpoint(checkpoint, folder, lora=lora, **EXACT)
    return folder


@pytest.fixture(scope="module")
def adapted(checkpoint: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    files = convert_checkpoint(checkpoint, folder, lora_adapter=lora, **EXACT)
    assert files.adapter is not None
    assert any("merged into the mmproj file" in note for note in files.notes)
    return folder


def named(adapter: Path | None) -> dict[str, Any]:
    """Options of `Model.load` and the name to choose the adapter by."""
    return {} if adapter is None else {"adapters": {"signs": adapter}}


def text_logits(folder: Path, lora: Path | None = None) -> np.ndarray:
    ids = golden("chat_text_fast")["ids"]
    with Model.load(folder, exact=True, **named(lora)) as model:
        embeddings = model.engine.decoder.embed(ids)
        model.engine.run(lambda: model.engine.decoder.prefill(embeddings, lora and "signs"))
        return model.engine.run(model.engine.decoder.logits)


def picture_logits(folder: Path, picture: Path, lora: Path | None = None) -> np.ndarray:
    with Model.load(folder, exact=True, **named(lora)) as model:
        question = [{"role": "user", "content": [picture, "What is this?"]}]
        return model.trace(question, 0, adapter=lora and "signs").logits


# --- merged ---------------------------------------------------------------------------------------------------


def test_merged_logits_equal_the_formula_in_double_precision(
    plain: CheckpointCopy, pairs: q.Pairs, merged: Path
) -> None:
    expected = q.merged_copy(plain, pairs, SCALE)
    naive = NaiveModel(plain.config, {name: tensor.values for name, tensor in expected.tensors.items()})
    ids = golden("chat_text_fast")["ids"]
    logits = naive.logits(plain.tensors["llm.model.embed_tokens.weight"].values[ids])
    np.testing.assert_allclose(text_logits(merged), logits, rtol=0, atol=LOGITS)


def test_both_parts_are_merged(
    plain: CheckpointCopy, pairs: q.Pairs, merged: Path, exact_folder: Path, images: dict[str, Path], tmp_path: Path
) -> None:
    """Files and logits with a picture equal those of a checkpoint merged by the formula; and they change much."""
    source = q.merged_copy(plain, pairs, SCALE).write(tmp_path / "source")
    convert_checkpoint(source, tmp_path / "out", **EXACT)
    ours, theirs, base = (picture_logits(f, images["square"]) for f in (merged, tmp_path / "out", exact_folder))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=LOGITS)
    assert np.abs(ours - base).max() > 0.5
    for name in ("ggml-model-F32.gguf", "mmproj-model-f32.gguf"):
        one, other = GGUFFile(merged / name), GGUFFile(tmp_path / "out" / name)
        for tensor in one.tensors:
            np.testing.assert_allclose(one.array(tensor), other.array(tensor), rtol=0, atol=1e-5, err_msg=tensor)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_merged_rows(checkpoint: Path, plain: CheckpointCopy, pairs: q.Pairs, lora: Path, step: int) -> None:
    source = Checkpoint(checkpoint)
    source.add_lora(lora)
    expected = q.merged_copy(plain, pairs, SCALE)
    for name in (f"{LAYER}mlp.down_proj.weight", "resampler.kv_proj.weight"):
        tensor = source.tensors[name]
        rows = [tensor.float_rows(i, min(i + step, tensor.n_rows)) for i in range(0, tensor.n_rows, step)]
        np.testing.assert_allclose(np.concatenate(rows), expected.tensors[name].values, rtol=0, atol=1e-5)


def merge(copy: CheckpointCopy, folder: Path, tensors: q.Parts, name: str, **settings: Any) -> np.ndarray:
    """A tensor of the checkpoint with a LoRA of these tensors."""
    source = Checkpoint(copy.write(folder / "source"))
    source.add_lora(q.write_lora(folder / "lora", tensors, **settings))
    tensor = source.tensors[name]
    return tensor.float_rows(0, tensor.n_rows).reshape(tensor.shape)


def test_scales(copy: CheckpointCopy, tmp_path: Path) -> None:
    """Alpha over rank, over its root when stabilised, and by patterns that match the end of a module's name."""
    name = f"{LAYER}self_attn.k_proj.weight"
    pairs = q.random_lora(copy, [name], rank=9)
    base, change = copy.tensors[name].values, pairs[name][1] @ pairs[name][0]
    cases: list[tuple[dict[str, Any], float]] = [
        ({}, 8 / 9),
        ({"use_rslora": True}, 8 / 3),
        ({"alpha_pattern": {"k_proj": 3}}, 3 / 9),
        ({"alpha_pattern": {r"layers\.[01]\.self_attn\.k_proj": 5, "k_proj": 3}}, 5 / 9),
        ({"alpha_pattern": {"q_proj": 3, "self_attn": 4, "proj": 4}}, 8 / 9),
    ]
    for number, (settings, scale) in enumerate(cases):
        found = merge(copy, tmp_path / str(number), q.lora_tensors(pairs), name, **settings)
        np.testing.assert_allclose(found, base + scale * change, rtol=0, atol=1e-5, err_msg=str(settings))


def test_convolutions_embeddings_and_attention(copy: CheckpointCopy, tmp_path: Path) -> None:
    """A kernel as A; a table of embeddings, whose A has a column per row; the resampler's joint input product."""
    kernel = "vpm.embeddings.patch_embedding.weight"
    (a, b) = q.random_lora(copy, [kernel])[kernel]
    tensors = {
        "vpm.embeddings.patch_embedding.lora_A.weight": stored(a),
        "vpm.embeddings.patch_embedding.lora_B.weight": stored(b[:, :, None, None]),
    }
    expected = copy.tensors[kernel].values + SCALE * np.einsum("or,rchw->ochw", b, a)
    np.testing.assert_allclose(merge(copy, tmp_path / "kernel", tensors, kernel), expected, rtol=0, atol=1e-5)
    table, rng = "llm.model.embed_tokens.weight", np.random.default_rng(1)
    a, b = rng.normal(size=(4, 682)).astype(np.float32), rng.normal(size=(256, 4)).astype(np.float32)
    tensors = {
        "llm.model.embed_tokens.lora_embedding_A": stored(a),
        "llm.model.embed_tokens.lora_embedding_B": stored(b),
    }
    expected = copy.tensors[table].values + SCALE * (b @ a).T
    np.testing.assert_allclose(merge(copy, tmp_path / "table", tensors, table), expected, rtol=0, atol=1e-4)
    joint = "resampler.attn.in_proj_weight"
    (a, b) = q.random_lora(copy, [joint])[joint]
    tensors = {"resampler.attn.lora_A.weight": stored(a), "resampler.attn.lora_B.weight": stored(b)}
    tensors |= {
        "resampler.attn.base_layer.out_proj.lora_A.weight": stored(a),
        "resampler.attn.base_layer.out_proj.lora_B.weight": stored(b[:256]),
    }
    expected = copy.tensors[joint].values + SCALE * b @ a
    np.testing.assert_allclose(merge(copy, tmp_path / "joint", tensors, joint), expected, rtol=0, atol=1e-5)
    out = "resampler.attn.out_proj.weight"
    expected = copy.tensors[out].values + SCALE * b[:256] @ a
    np.testing.assert_allclose(merge(copy, tmp_path / "out", tensors, out), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("infix", ["", ".modules_to_save", ".modules_to_save.default"])
def test_tensors_trained_whole_replace_the_checkpoints(copy: CheckpointCopy, tmp_path: Path, infix: str) -> None:
    """As the official fine-tuning script has it for resampler and embeddings; names differ between versions."""
    values = np.random.default_rng(0).normal(size=(256,)).astype(np.float32)
    tensors = {f"resampler.ln_q{infix}.weight": stored(values)}
    np.testing.assert_array_equal(merge(copy, tmp_path, tensors, "resampler.ln_q.weight"), values)


def test_dora_gives_rows_their_lengths(copy: CheckpointCopy, tmp_path: Path) -> None:
    name = f"{LAYER}mlp.up_proj.weight"
    pairs = q.random_lora(copy, [name])
    lengths = np.random.default_rng(0).uniform(0.5, 2, 768).astype(np.float32)
    module = name.removesuffix(".weight")
    tensors = {**q.lora_tensors(pairs), f"{module}.lora_magnitude_vector": stored(lengths)}
    changed = copy.tensors[name].values + SCALE * pairs[name][1] @ pairs[name][0]
    expected = changed * (lengths / np.linalg.norm(changed, axis=1))[:, None]
    found = merge(copy, tmp_path, tensors, name, use_dora=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_lora_of_the_bare_decoder(copy: CheckpointCopy, tmp_path: Path) -> None:
    """Trained on Qwen3ForCausalLM alone, whose names lack `llm.`; saved with the adapter's name."""
    name = f"{LAYER}mlp.up_proj.weight"
    pairs = q.random_lora(copy, [name])
    tensors = {
        key.removeprefix("llm.").replace(".weight", ".default.weight"): value
        for key, value in q.lora_tensors(pairs).items()
    }
    expected = q.merged_copy(copy, pairs, SCALE).tensors[name].values
    np.testing.assert_allclose(merge(copy, tmp_path, tensors, name), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [q.nf4_copy, q.awq_copy], ids=["nf4", "awq"])
def test_merged_into_a_quantised_checkpoint(
    copy: CheckpointCopy, tmp_path: Path, make: Callable[[CheckpointCopy], tuple[CheckpointCopy, CheckpointCopy]]
) -> None:
    """QLoRA: added to the values of the 4-bit matrices; an answer comes of it in the default types."""
    quantised, plain = make(copy)
    pairs = q.random_lora(plain, DECODER_PARTS)
    lora = q.write_lora(tmp_path / "lora", q.lora_tensors(pairs))
    source = quantised.write(tmp_path / "source")
    convert_checkpoint(source, tmp_path / "out", lora=lora, **EXACT)
    expected = q.merged_copy(plain, pairs, SCALE)
    file = GGUFFile(tmp_path / "out" / "ggml-model-F32.gguf")
    values = expected.tensors[f"{LAYER}self_attn.v_proj.weight"].values
    np.testing.assert_allclose(file.array("blk.1.attn_v.weight"), values, rtol=0, atol=1e-5)
    convert_checkpoint(source, tmp_path / "small", lora=lora)
    with Model.load(tmp_path / "small") as model:
        assert model.chat("Hello", greedy=True, max_tokens=4).completion_tokens > 0


# --- as an adapter --------------------------------------------------------------------------------------------


def test_an_adapters_logits_are_the_merged_files(
    adapted: Path, merged: Path, exact_folder: Path, images: dict[str, Path]
) -> None:
    adapter = adapted / "adapter-signs.gguf"
    ours, theirs = text_logits(adapted, lora=adapter), text_logits(merged)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=LOGITS)
    assert np.abs(text_logits(adapted) - theirs).max() > 0.5  # without the adapter
    np.testing.assert_allclose(text_logits(adapted), text_logits(exact_folder), rtol=0, atol=1e-5)
    ours = picture_logits(adapted, images["square"], lora=adapter)
    np.testing.assert_allclose(ours, picture_logits(merged, images["square"]), rtol=0, atol=LOGITS)


def test_what_stands_in_an_adapter(adapted: Path, pairs: q.Pairs, lora: Path) -> None:
    """Names and alpha as llama.cpp has them, A and B as they were; the folder stays a model."""
    file = GGUFFile(adapted / "adapter-signs.gguf")
    assert {key: file.metadata[key] for key in ("general.type", "general.architecture", "adapter.type")} == {
        "general.type": "adapter",
        "general.architecture": "qwen3",
        "adapter.type": "lora",
    }
    assert file.metadata["adapter.lora.alpha"] == 8.0
    assert len(file.tensors) == 2 * len(DECODER_PARTS)
    a, b = pairs[f"{LAYER}self_attn.q_proj.weight"]
    np.testing.assert_array_equal(file.array("blk.1.attn_q.weight.lora_a"), a)
    np.testing.assert_array_equal(file.array("blk.1.attn_q.weight.lora_b"), b)
    assert "output.weight.lora_a" in file.tensors
    assert find_model(adapted).decoder.name == "ggml-model-F32.gguf"


def test_adapters_are_no_models_whatever_their_name(adapted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapted, tmp_path / "model")
    (folder / "adapter-signs.gguf").rename(folder / "adapter-mmproj.gguf")
    found = find_model(folder)
    assert (found.decoder.name, found.mmproj.name) == ("ggml-model-F32.gguf", "mmproj-model-f32.gguf")


def test_other_scales_are_put_into_b(copy: CheckpointCopy, tmp_path: Path) -> None:
    """llama.cpp knows alpha over rank alone."""
    names = [f"{LAYER}self_attn.{part}_proj.weight" for part in "qv"]
    pairs = q.random_lora(copy, names)
    settings = {"use_rslora": True, "alpha_pattern": {"v_proj": 2}}
    lora = q.write_lora(tmp_path / "lora", q.lora_tensors(pairs), **settings)
    source = copy.write(tmp_path / "source")
    convert_checkpoint(source, tmp_path / "merged", lora=lora, **EXACT)
    convert_checkpoint(source, tmp_path / "out", lora_adapter=lora, **EXACT)
    ours = text_logits(tmp_path / "out", lora=tmp_path / "out" / "adapter-lora.gguf")
    np.testing.assert_allclose(ours, text_logits(tmp_path / "merged"), rtol=0, atol=LOGITS)


def test_an_adapter_beside_four_bits_answers_on_the_command_line(
    checkpoint: Path, lora: Path, tmp_path: Path, images: dict[str, Path]
) -> None:
    runner = CliRunner()
    out = ["-o", str(tmp_path / "out")]
    result = runner.invoke(main, ["convert", str(checkpoint), *out, "--lora-adapter", str(lora)])
    assert result.exit_code == 0, result.output
    assert "adapter-signs.gguf" in result.stdout
    assert "merged into the mmproj file" in result.stderr
    adapter = tmp_path / "out" / "adapter-signs.gguf"
    arguments = ["run", "-m", str(tmp_path / "out"), str(images["square"]), "What?", "--greedy", "--max-tokens", "8"]
    answers = [runner.invoke(main, [*arguments, *more, "--json"]) for more in ([], ["--lora", str(adapter)])]
    assert [answer.exit_code for answer in answers] == [0, 0]
    texts = [json.loads(answer.stdout)["answer"] for answer in answers]
    assert texts[0] != texts[1]


def test_a_copied_lora_gives_the_same_files(checkpoint: Path, lora: Path, merged: Path, tmp_path: Path) -> None:
    """Half precision of A and B, as training saves it, is read as such."""
    copy = shutil.copytree(lora, tmp_path / "half")
    path = copy / "adapter_model.safetensors"
    halves = {name: stored(tensor.values, "F16") for name, tensor in read_shard(path).items()}
    path.write_bytes(shard_bytes(halves))
    convert_checkpoint(checkpoint, tmp_path / "out", lora=copy, **EXACT)
    one, other = (GGUFFile(folder / "ggml-model-F32.gguf") for folder in (merged, tmp_path / "out"))
    np.testing.assert_allclose(
        one.array("blk.0.attn_q.weight"), other.array("blk.0.attn_q.weight"), rtol=0, atol=5e-3
    )
