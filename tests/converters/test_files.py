"""What stands in the files: names, keys, tensors, their types and their values, against the checkpoint's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint_copies import CheckpointCopy
from edge_converters import DECODER_TYPES, VISION_TYPES, convert_checkpoint
from edge_converters.convert import Converted
from edge_runtime.weights.gguf_file import GGUFFile

N_LAYERS = 3  # of the tiny decoder and of its vision tower
HIDDEN, WIDTH, VISION_MLP = 256, 160, 304

DECODER_KEYS = {
    "general.architecture": "qwen3",
    "general.type": "model",
    "general.name": "MiniCPM-V-4_5",
    "general.quantization_version": 2,
    "qwen3.block_count": N_LAYERS,
    "qwen3.context_length": 40960,
    "qwen3.embedding_length": HIDDEN,
    "qwen3.feed_forward_length": 768,
    "qwen3.attention.head_count": 4,
    "qwen3.attention.head_count_kv": 2,
    "qwen3.attention.key_length": 64,
    "qwen3.attention.value_length": 64,
    "qwen3.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    "qwen3.rope.freq_base": 1e6,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.bos_token_id": 578,
    "tokenizer.ggml.eos_token_id": 579,
    "tokenizer.ggml.padding_token_id": 577,
    "tokenizer.ggml.unknown_token_id": 496,
    "tokenizer.ggml.add_bos_token": False,
    "edge_runtime.tokenizer.normalizer": "nfc",
}
LONG_DECODER_KEYS = {
    "general.file_type",
    "tokenizer.chat_template",
    *(f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")),
}
VISION_KEYS = {
    "general.architecture": "clip",
    "general.type": "mmproj",
    "general.name": "MiniCPM-V-4_5",
    "general.description": "image encoder for MiniCPM-V",
    "clip.has_text_encoder": False,
    "clip.has_vision_encoder": True,
    "clip.has_minicpmv_projector": True,
    "clip.projector_type": "resampler",
    "clip.minicpmv_version": 6,
    "clip.minicpmv_query_num": 64,
    "clip.use_gelu": True,
    "clip.vision.image_size": 448,
    "clip.vision.patch_size": 14,
    "clip.vision.embedding_length": WIDTH,
    "clip.vision.feed_forward_length": VISION_MLP,
    "clip.vision.projection_dim": 0,
    "clip.vision.attention.head_count": 4,
    "clip.vision.attention.layer_norm_epsilon": pytest.approx(1e-6),
    "clip.vision.block_count": N_LAYERS,
    "clip.vision.image_mean": [0.5, 0.5, 0.5],
    "clip.vision.image_std": [0.5, 0.5, 0.5],
    "edge_runtime.max_slice_nums": 9,
    "edge_runtime.use_image_id": True,
}

DECODER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
VISION_LAYER = {f"attn_{part}": f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")} | {
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "ffn_down": "mlp.fc1",  # swapped, as llama.cpp's script does
    "ffn_up": "mlp.fc2",
}
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "int4": 2}  # LLAMA_FTYPE_*
NOT_QUANTIZED = {"v.patch_embd.weight": "F16", "v.position_embd.weight": "F16", "resampler.query": "F32"}


def expected_decoder(copy: CheckpointCopy) -> dict[str, np.ndarray]:
    """Name to values of the decoder file."""
    source = {
        "token_embd.weight": "llm.model.embed_tokens.weight",
        "output_norm.weight": "llm.model.norm.weight",
        "output.weight": "llm.lm_head.weight",
    }
    for n in range(N_LAYERS):
        for ours, theirs in DECODER_LAYER.items():
            source[f"blk.{n}.{ours}.weight"] = f"llm.model.layers.{n}.{theirs}.weight"
    return {name: copy.tensors[theirs].values for name, theirs in source.items()}


def expected_vision(copy: CheckpointCopy) -> dict[str, np.ndarray]:
    """Name to values of the mmproj file."""
    source = {"v.position_embd.weight": "vpm.embeddings.position_embedding.weight"}
    source |= {"resampler.query": "resampler.query", "resampler.kv.weight": "resampler.kv_proj.weight"}
    pairs = {"v.patch_embd": "vpm.embeddings.patch_embedding", "v.post_ln": "vpm.post_layernorm"}
    pairs |= {"resampler.attn.out": "resampler.attn.out_proj"}
    pairs |= {f"resampler.ln_{name}": f"resampler.ln_{name}" for name in ("q", "kv", "post")}
    for n in range(N_LAYERS):
        pairs |= {f"v.blk.{n}.{ours}": f"vpm.encoder.layers.{n}.{theirs}" for ours, theirs in VISION_LAYER.items()}
    for ours, theirs in pairs.items():
        source |= {f"{ours}.{part}": f"{theirs}.{part}" for part in ("weight", "bias")}
    values = {name: copy.tensors[theirs].values for name, theirs in source.items()}
    for third, letter in enumerate("qkv"):
        rows = slice(third * HIDDEN, (third + 1) * HIDDEN)
        values[f"resampler.attn.{letter}.weight"] = copy.tensors["resampler.attn.in_proj_weight"].values[rows]
        values[f"resampler.attn.{letter}.bias"] = copy.tensors["resampler.attn.in_proj_bias"].values[rows]
    values["resampler.proj.weight"] = copy.tensors["resampler.proj"].values.T
    values["resampler.pos_embed_k"] = positions(HIDDEN, 70)
    return values


def positions(dim: int, side: int) -> np.ndarray:
    """Sine table of a square grid, written anew: columns fill the first half, sines precede cosines."""
    omega = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    row, column = np.divmod(np.arange(side * side), side)
    halves = [f(np.outer(axis, omega)) for axis in (column, row) for f in (np.sin, np.cos)]
    return np.concatenate(halves, axis=1)


def plain(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in metadata.items()}


@pytest.mark.parametrize("kind", DECODER_TYPES)
def test_decoder_keys(converted: Callable[[str, str], Converted], kind: str) -> None:
    metadata = plain(GGUFFile(converted(kind, "f32").decoder).metadata)
    assert {key: value for key, value in metadata.items() if key not in LONG_DECODER_KEYS} == DECODER_KEYS
    assert set(metadata) == LONG_DECODER_KEYS | set(DECODER_KEYS)
    assert metadata["general.file_type"] == DECODER_TYPES[kind].file_type


@pytest.mark.parametrize("kind", VISION_TYPES)
def test_vision_keys(converted: Callable[[str, str], Converted], kind: str) -> None:
    metadata = plain(GGUFFile(converted("f32", kind).mmproj).metadata)
    ours_alone = {
        "clip.projector_type": "edge_runtime.resampler",
        **{f"edge_runtime.row_length.v.blk.{n}.ffn_up.weight": VISION_MLP for n in range(N_LAYERS)},
    }
    expected = VISION_KEYS | {"general.file_type": FILE_TYPES[kind]}
    assert metadata == (expected | ours_alone if kind == "int4" else expected)


def test_decoder_tensors_hold_the_checkpoints_values(
    converted: Callable[[str, str], Converted], copy: CheckpointCopy
) -> None:
    file, expected = GGUFFile(converted("f32", "f32").decoder), expected_decoder(copy)
    assert set(file.tensors) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(file.array(name), values, err_msg=name)


def test_vision_tensors_hold_the_checkpoints_values(
    converted: Callable[[str, str], Converted], copy: CheckpointCopy
) -> None:
    """Bytes of the swapped fc1 and fc2, the transposed projection and the thirds of q, k, v included."""
    file, expected = GGUFFile(converted("f32", "f32").mmproj), expected_vision(copy)
    assert set(file.tensors) == set(expected)
    for name, values in expected.items():
        # The table is computed in float32 there and in float64 here: phases up to 69 err by 69 * 2^-24.
        tolerance = 5e-6 if name == "resampler.pos_embed_k" else 0
        np.testing.assert_allclose(file.array(name), values, rtol=0, atol=tolerance, err_msg=name)


EIGHT_BITS = {f"resampler.{name}.weight" for name in ("kv", "attn.v", "attn.out", "proj")}
MATRICES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "int4": "Q4_0"}


@pytest.mark.parametrize(("kind", "matrix"), MATRICES.items())
def test_vision_tensor_types(converted: Callable[[str, str], Converted], kind: str, matrix: str) -> None:
    """Biases and norms are float32, matrices as asked; fc2's rows of 304 are no whole number of blocks of 32."""
    infos = GGUFFile(converted("f32", kind).mmproj).tensors
    assert ("resampler.pos_embed_k" in infos) == (kind != "int4")  # llama.cpp alone wants it
    for name, info in infos.items():
        expected = matrix if name.endswith(".weight") and len(info.shape) > 1 else "F32"
        if kind != "f32":
            expected = NOT_QUANTIZED.get(name, expected)
        if kind == "bf16":  # which llama.cpp's convolution cannot read, and float16 cannot always hold
            expected = {"v.patch_embd.weight": "F32", "v.position_embd.weight": "BF16"}.get(name, expected)
        if kind in ("q8_0", "q4_0") and ".ffn_up.weight" in name:
            assert info.shape == (WIDTH, VISION_MLP)
            expected = "F16"
        assert info.padding == (16 if kind == "int4" and ".ffn_up.weight" in name else 0)
        if matrix == "Q4_0" and name in EIGHT_BITS:
            expected = "Q8_0"
        if name == "resampler.pos_embed_k":  # never read by llama.cpp: small where that is allowed
            expected = "F32" if kind == "f16" else matrix
        assert info.type.name == expected, name


@pytest.mark.parametrize("kind", DECODER_TYPES)
def test_decoder_file_names(converted: Callable[[str, str], Converted], kind: str) -> None:
    files = converted(kind, "f32")
    assert files.decoder.name == f"ggml-model-{kind.upper()}.gguf"
    assert sorted(path.name for path in files.decoder.parent.iterdir()) == [files.decoder.name, files.mmproj.name]


@pytest.mark.parametrize("kind", VISION_TYPES)
def test_vision_file_names(converted: Callable[[str, str], Converted], kind: str) -> None:
    assert converted("f32", kind).mmproj.name == f"mmproj-model-{kind}.gguf"


def test_converting_twice_gives_identical_bytes(
    checkpoint: Path, converted: Callable[[str, str], Converted], tmp_path: Path
) -> None:
    first = converted("q4_k_m", "q8_0")
    second = convert_checkpoint(checkpoint, tmp_path)
    third = convert_checkpoint(checkpoint, tmp_path, force=True)
    for files in (second, third):
        assert files.decoder.read_bytes() == first.decoder.read_bytes()
        assert files.mmproj.read_bytes() == first.mmproj.read_bytes()
