"""Checkpoints that cannot be converted: one sentence each, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint_copies import INDEX, CheckpointCopy, Stored, stored
from edge_converters import convert_checkpoint
from edge_runtime.errors import CheckpointError

Q_PROJ = "llm.model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "llm.model.embed_tokens.weight"

Change = Callable[[CheckpointCopy], Any]


def refuse(source: Path, folder: Path, match: str, **types: str) -> None:
    """Expect a refusal in one sentence (two at most), before anything is written."""
    with pytest.raises(CheckpointError, match=match) as caught:
        convert_checkpoint(source, folder, **types)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert not folder.exists() or not any(folder.iterdir())


def replaced(copy: CheckpointCopy, name: str, value: float) -> None:
    """Put one value into a tensor."""
    values = copy.tensors[name].values.copy()
    values.reshape(-1)[-7] = value
    copy.tensors[name] = stored(values)


CONFIGS: dict[str, tuple[Change, str]] = {
    "another model": (lambda c: c.config.update(model_type="qwen3"), "model_type 'qwen3'"),
    "no model type": (lambda c: c.config.pop("model_type"), "model_type None"),
    "version 2.6": (lambda c: c.config.update(version=2.6), "version 2.6; only 4.5"),
    "no version": (lambda c: c.config.pop("version"), "version None"),
    "GPTQ": (lambda c: c.config.update(quantization_config={"quant_method": "gptq"}), r"already quantised \(gptq\)"),
    "AWQ in another layout": (
        lambda c: c.config.update(quantization_config={"quant_method": "awq", "version": "GEMV"}),
        r"already quantised \(awq\); of such, only",
    ),
    "AWQ in 8 bits": (
        lambda c: c.config.update(quantization_config={"quant_method": "awq", "bits": 8}),
        r"already quantised \(awq\); of such, only",
    ),
    "bitsandbytes in 8 bits": (
        lambda c: c.config.update(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        r"already quantised \(bitsandbytes\); of such, only",
    ),
    "quantised oddly": (lambda c: c.config.update(quantization_config="int4"), r"already quantised \(int4\)"),
    "no config": (lambda c: c.files.pop("config.json"), "no config.json"),
    "config is no JSON": (lambda c: c.files.update({"config.json": b"{"}), "not readable JSON"),
    "config is a list": (lambda c: c.files.update({"config.json": b"[]"}), "holds a list, expected a JSON object"),
    "size missing": (lambda c: c.config.pop("hidden_size"), "None for hidden_size, expected a number"),
    "size is text": (lambda c: c.config.update(hidden_size="256"), "'256' for hidden_size, expected a number"),
    "vision config missing": (lambda c: c.config.pop("vision_config"), "vision_config.num_hidden_layers"),
    "vision config is a list": (lambda c: c.config.update(vision_config=[]), "vision_config.num_hidden_layers"),
    "scaled rotary": (lambda c: c.config.update(rope_scaling={"type": "yarn"}), "sets rope_scaling"),
    "other vision activation": (lambda c: c.config["vision_config"].update(hidden_act="relu"), "uses 'relu'"),
    "slice config is text": (lambda c: c.config.update(slice_config="9"), "hold '9' for scale_resolution"),
    "slices are text": (
        lambda c: c.files["preprocessor_config.json"].update(max_slice_nums="9"),
        "hold '9' for max_slice_nums",
    ),
    "mean is text": (lambda c: c.files["preprocessor_config.json"].update(norm_mean="0.5"), "norm_mean"),
    "mean of one": (lambda c: c.files["preprocessor_config.json"].update(norm_mean=[0.5]), "norm_mean"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(copy: CheckpointCopy, tmp_path: Path, name: str) -> None:
    change, match = CONFIGS[name]
    change(copy)
    refuse(copy.write(tmp_path / "source"), tmp_path / "out", match)


TENSORS: dict[str, tuple[Change, str]] = {
    "missing matrix": (lambda c: c.tensors.pop(Q_PROJ), f"lacks {Q_PROJ}"),
    "missing embedding": (lambda c: c.tensors.pop(EMBEDDING), f"lacks {EMBEDDING}"),
    "missing head": (lambda c: c.tensors.pop("llm.lm_head.weight"), "lacks llm.lm_head.weight"),
    "missing projection": (lambda c: c.tensors.pop("resampler.proj"), "lacks resampler.proj"),
    "missing bias": (lambda c: c.tensors.pop("vpm.encoder.layers.0.mlp.fc1.bias"), "lacks vpm.enc.*fc1.bias"),
    "extra tensor": (
        lambda c: c.tensors.update({f"{Q_PROJ}.lora_A": stored(np.ones(4))}),
        "does not have .1, such as .*lora_A",
    ),
    "extra layer": (
        lambda c: c.tensors.update({"llm.model.layers.3.mlp.up_proj.weight": stored(np.ones((768, 256)))}),
        "does not have .1, such as llm.model.layers.3.mlp",
    ),
    "transposed": (
        lambda c: c.tensors.update({"resampler.kv_proj.weight": Stored("BF16", (160, 256), bytes(160 * 256 * 2))}),
        r"shape \(160, 256\), expected \(256, 160\)",
    ),
    "fewer rows than config.json says": (
        lambda c: c.config.update(vocab_size=700),
        r"embed_tokens.weight has shape \(682, 256\), expected \(700, 256\)",
    ),
    "8-bit integers": (
        lambda c: c.tensors.update({Q_PROJ: Stored("I8", (256, 256), bytes(65536))}),
        "stored as I8; expected F32, F16 or BF16",
    ),
    "doubles": (
        lambda c: c.tensors.update({Q_PROJ: Stored("F64", (256, 256), bytes(8 * 65536))}),
        "stored as F64",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(copy: CheckpointCopy, tmp_path: Path, name: str) -> None:
    change, match = TENSORS[name]
    change(copy)
    refuse(copy.write(tmp_path / "source"), tmp_path / "out", match)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [Q_PROJ, "resampler.attn.in_proj_weight", "llm.model.norm.weight"])
@pytest.mark.parametrize("types", [("f32", "f32"), ("q4_k_m", "q8_0")])
def test_values_that_are_no_numbers(
    copy: CheckpointCopy, tmp_path: Path, name: str, value: float, types: tuple[str, str]
) -> None:
    replaced(copy, name, value)
    source = copy.write(tmp_path / "source")
    refuse(source, tmp_path / "out", "NaN or infinity", decoder_type=types[0], vision_type=types[1])


def test_bfloat16_nan_is_found_where_bits_are_copied(copy: CheckpointCopy, tmp_path: Path) -> None:
    old = copy.tensors[Q_PROJ]
    copy.tensors[Q_PROJ] = Stored("BF16", old.shape, old.raw[:-2] + b"\xc0\x7f")
    refuse(copy.write(tmp_path / "source"), tmp_path / "out", "NaN or infinity", decoder_type="bf16")


@pytest.mark.parametrize(
    ("name", "types"), [(Q_PROJ, {"decoder_type": "f16"}), ("resampler.proj", {"vision_type": "f16"})]
)
def test_values_too_large_for_float16(copy: CheckpointCopy, tmp_path: Path, name: str, types: dict[str, str]) -> None:
    replaced(copy, name, -70000.0)
    source = copy.write(tmp_path / "source")
    refuse(source, tmp_path / "out", "7e.04 does not fit float16", **types)
    convert_checkpoint(source, tmp_path / "wide", decoder_type="bf16", vision_type="f32")


def no_tokenizer(copy: CheckpointCopy) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        copy.files.pop(name, None)


def fast_only(copy: CheckpointCopy, **changes: Any) -> None:
    """Leave tokenizer.json as the only source, changed."""
    del copy.files["vocab.json"]
    copy.files["tokenizer.json"] |= changes


def without_end(copy: CheckpointCopy) -> None:
    del copy.files["tokenizer_config.json"]["eos_token"]
    del copy.config["eos_token_id"]


TOKENIZERS: dict[str, tuple[Change, str]] = {
    "missing": (no_tokenizer, "has no tokenizer; expected vocab.json and merges.txt"),
    "merges missing": (
        lambda c: (c.files.pop("merges.txt"), c.files.pop("tokenizer.json")),
        "has no tokenizer",
    ),
    "unigram": (lambda c: fast_only(c, model={"type": "Unigram"}), "type 'Unigram'; expected the byte-level BPE"),
    "another split pattern": (
        lambda c: fast_only(c, pre_tokenizer={"type": "Split", "pattern": {"Regex": r"\w+"}}),
        "another pattern than Qwen2's",
    ),
    "no split pattern": (lambda c: fast_only(c, pre_tokenizer=None), "another pattern than Qwen2's"),
    "id beyond the table": (
        lambda c: c.files["added_tokens.json"].update({"<far>": 682}),
        "token with id 682, but the embedding table has only 682 rows",
    ),
    "a token twice": (
        lambda c: c.files["tokenizer_config.json"]["added_tokens_decoder"]["600"].update(content="<think>"),
        "'<think>' under two ids",
    ),
    "no end token": (without_end, "names no end token"),
    "ids that are no numbers": (lambda c: c.files["vocab.json"].update({"a": "b"}), "no whole number as id of 'a'"),
    "an id below zero": (lambda c: c.files["added_tokens.json"].update({"<below>": -1}), "id -1"),
    "added tokens without text": (
        lambda c: c.files["tokenizer_config.json"]["added_tokens_decoder"].update({"600": {}}),
        "do not have the usual form",
    ),
    "merges.txt is no text": (lambda c: c.files.update({"merges.txt": b"\xff"}), "not readable text"),
    "vocab.json is no JSON": (lambda c: c.files.update({"vocab.json": b"{"}), "not readable JSON"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(copy: CheckpointCopy, tmp_path: Path, name: str) -> None:
    change, match = TOKENIZERS[name]
    change(copy)
    refuse(copy.write(tmp_path / "source"), tmp_path / "out", match)


def header(content: bytes, length: int | None = None) -> bytes:
    return (len(content) if length is None else length).to_bytes(8, "little") + content


def entry(**changes: Any) -> bytes:
    fields = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return header(json.dumps({"x": {k: v for k, v in fields.items() if v is not None}}).encode()) + bytes(8)


SHARDS = {
    "empty": b"",
    "shorter than the length": b"\x10\0\0",
    "length beyond the file": header(b"{}", 1 << 40),
    "length above the limit": header(b"{}", 100_000_001),
    "text": b"<!doctype html><html></html>",
    "no JSON": header(b"\x00\xff\xfe garbage"),
    "deep JSON": header(b"[" * 100_000),
    "no object": header(b"[1, 2]"),
    "entry is no object": header(b'{"x": 3}'),
    "no dtype": entry(dtype=None),
    "no offsets": entry(data_offsets=None),
    "three offsets": entry(data_offsets=[0, 4, 8]),
    "offsets too far": entry(data_offsets=[4, 12]),
    "offsets backwards": entry(data_offsets=[8, 0]),
    "offsets before the data": entry(data_offsets=[-8, 0]),
    "infinite offset": entry(data_offsets=[0, float("inf")]),
    "negative shape": entry(shape=[-1, -2]),
    "shape and bytes differ": entry(shape=[3]),
}


@pytest.mark.parametrize("name", SHARDS)
def test_damaged_shards(copy: CheckpointCopy, tmp_path: Path, name: str) -> None:
    source = copy.write(tmp_path / "source")
    (source / "model.safetensors").write_bytes(SHARDS[name])
    refuse(source, tmp_path / "out", "model.safetensors is not a usable safetensors file")


def test_a_truncated_shard(copy: CheckpointCopy, tmp_path: Path) -> None:
    source = copy.write(tmp_path / "source", 2)
    path = source / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refuse(source, tmp_path / "out", "does not lie inside the file")


def test_a_shard_that_shrinks_while_it_is_read(
    copy: CheckpointCopy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_converters import convert

    source = copy.write(tmp_path / "source")
    path = source / "model.safetensors"

    def shrink(checkpoint: Any) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    monkeypatch.setattr(convert, "refuse_unknown_tensors", shrink)
    refuse(source, tmp_path / "out", "model.safetensors ends inside")


def test_a_missing_shard_of_the_index(copy: CheckpointCopy, tmp_path: Path) -> None:
    source = copy.write(tmp_path / "source", 3)
    (source / "model-00002-of-00003.safetensors").unlink()
    refuse(source, tmp_path / "out", "lacks model-00002-of-00003.safetensors of 3 shards")


def test_a_shard_that_lacks_what_the_index_says(copy: CheckpointCopy, tmp_path: Path) -> None:
    source = copy.write(tmp_path / "source", 2)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["llm.extra"] = "model-00001-of-00002.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    refuse(source, tmp_path / "out", "lack tensors of their index .1, such as llm.extra")


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ([], "holds a list"),
        ({}, "has no weight_map"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({"weight_map": {"x": "../elsewhere.safetensors"}}, "names files outside the folder"),
        ({"weight_map": {}}, "holds no"),
    ],
)
def test_damaged_indexes(copy: CheckpointCopy, tmp_path: Path, index: Any, match: str) -> None:
    source = copy.write(tmp_path / "source")
    (source / INDEX).write_text(json.dumps(index))
    refuse(source, tmp_path / "out", match)


def test_two_checkpoints_in_one_folder(copy: CheckpointCopy, tmp_path: Path) -> None:
    source = copy.write(tmp_path / "source")
    (source / "old.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    refuse(source, tmp_path / "out", "is in model.safetensors and in old.safetensors")


def test_places_without_a_checkpoint(copy: CheckpointCopy, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refuse(tmp_path / "nowhere", out, "is no folder; expected a Hugging Face checkpoint")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    refuse(file, out, "is no folder")
    source = copy.write(tmp_path / "source")
    (source / "model.safetensors").unlink()
    refuse(source, out, "holds no .*safetensors")
    (source / "model.safetensors").symlink_to(tmp_path / "a-download-that-never-ended")
    refuse(source, out, "holds no .*safetensors")


def test_unknown_types(checkpoint: Path, tmp_path: Path) -> None:
    refuse(checkpoint, tmp_path / "out", "'q3_k'.*expected one of f32", decoder_type="q3_k")
    refuse(checkpoint, tmp_path / "out", "'q4_k_m'.*expected one of f32", vision_type="q4_k_m")


def test_a_shard_that_cannot_be_read(copy: CheckpointCopy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing disk is reported as the checkpoint's, not as the output folder's."""
    source = copy.write(tmp_path / "source")
    usual = Path.open

    def open_(path: Path, mode: str = "r", buffering: int = -1, **rest: Any) -> Any:
        if path.suffix == ".safetensors" and buffering == 0:
            raise OSError(5, "Input/output error")
        return usual(path, mode, buffering, **rest)

    monkeypatch.setattr(Path, "open", open_)
    refuse(source, tmp_path / "out", "model.safetensors cannot be read: Input/output error")
    (source / "model.safetensors").unlink()
    monkeypatch.undo()
    (source / "model.safetensors").mkdir()
    refuse(source, tmp_path / "out", "holds no .*safetensors")
