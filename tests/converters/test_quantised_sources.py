"""Checkpoints of bitsandbytes and AutoAWQ: values by the formulas, and what becomes of them, up to an answer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.quants import dequantize

import quantised_copies as q
from checkpoint_copies import CheckpointCopy, Stored
from conftest import golden
from edge_converters import convert_checkpoint
from edge_converters.sources.checkpoint import Checkpoint
from edge_runtime import Model
from edge_runtime.errors import CheckpointError
from edge_runtime.weights.gguf_file import GGUFFile
from naive import NaiveModel

FORMULA = 1e-6  # relative; both sides are a few float32 operations
LOGITS = 1e-3  # as in tolerances.py
# Cosine of logits between a quantised source and its plain values, in the same type. What is rounded differs by a
# detour through float16, and a search for the best scales of a block may fall on others then. In Q4_1, AWQ keeps its
# integers, while the plain values are rounded anew, to 8 % of a weight.
SAME_ANSWER = {"q4_k_m": 0.995, "q4_1": 0.93}
GATE = "llm.model.layers.1.mlp.gate_proj"


def read_back(folder: Path, name: str, step: int) -> np.ndarray:
    """All rows of a tensor, some at a time."""
    tensor = Checkpoint(folder).tensors[name]
    parts = [tensor.float_rows(i, min(i + step, tensor.n_rows)) for i in range(0, tensor.n_rows, step)]
    return np.concatenate(parts).reshape(tensor.shape)


def with_matrix(copy: CheckpointCopy, parts: dict[str, Stored], folder: Path) -> Path:
    """A checkpoint that holds one more matrix, which only the reader is asked for."""
    return CheckpointCopy(copy.files, {**copy.tensors, **parts}).write(folder)


# --- bitsandbytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", [(256, 256), (48, 20), (7, 13), (1, 64), (130, 640)], ids=str)
@pytest.mark.parametrize("step", [1, 5, 1000])
def test_nf4_values_equal_the_formula(
    copy: CheckpointCopy, tmp_path: Path, shape: tuple[int, int], double: bool, step: int
) -> None:
    """Rows that do not end with a block or a byte included."""
    weight = np.random.default_rng(shape[0]).normal(0, 0.02, shape).astype(np.float32)
    parts = q.nf4_parts("llm.extra.weight", weight, double=double)
    expected = q.nf4_values("llm.extra.weight", parts)
    found = read_back(with_matrix(copy, parts, tmp_path / "source"), "llm.extra.weight", step)
    np.testing.assert_allclose(found, expected, rtol=FORMULA, atol=0)
    assert np.abs(expected - weight).max() < 0.3 * np.abs(weight).max(), "the formula does not undo the quantiser"


def test_any_table_and_block_size_of_bitsandbytes(copy: CheckpointCopy, tmp_path: Path) -> None:
    """FP4 is another table under another name."""
    table = np.array([0, 0.0052, 0.6667, 1, 0.3333, 0.5, 0.1667, 0.25] * 2, np.float32) * np.repeat([1, -1], 8)
    weight = np.random.default_rng(0).normal(0, 1, (16, 256)).astype(np.float32)
    parts = q.nf4_parts("llm.extra.weight", weight, table=table.astype(np.float32), block=128)
    expected = q.nf4_values("llm.extra.weight", parts)
    state = "llm.extra.weight.quant_state.bitsandbytes__"
    parts[state + "fp4"] = parts.pop(state + "nf4")
    found = read_back(with_matrix(copy, parts, tmp_path / "source"), "llm.extra.weight", 3)
    np.testing.assert_allclose(found, expected, rtol=FORMULA, atol=0)


@pytest.fixture(scope="module")
def nf4(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CheckpointCopy]:
    """The tiny checkpoint in NF4, and the plain one with its values."""
    quantised, plain = q.nf4_copy(CheckpointCopy.of(checkpoint))
    return quantised.write(tmp_path_factory.mktemp("nf4"), 2), plain


@pytest.fixture(scope="module")
def awq(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CheckpointCopy]:
    """The tiny checkpoint in AWQ, and the plain one with its values."""
    quantised, plain = q.awq_copy(CheckpointCopy.of(checkpoint))
    return quantised.write(tmp_path_factory.mktemp("awq"), 2), plain


@pytest.mark.parametrize("kind", ["nf4", "awq"])
def test_float_files_hold_the_values_of_the_formula(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Every tensor of both files, against those made of a plain checkpoint with the formula's values."""
    source, plain = request.getfixturevalue(kind)
    types = {"decoder_type": "f32", "vision_type": "f32"}
    ours = convert_checkpoint(source, tmp_path / "ours", **types)
    expected = convert_checkpoint(plain.write(tmp_path / "plain"), tmp_path / "expected", **types)
    for one, other in ((ours.decoder, expected.decoder), (ours.mmproj, expected.mmproj)):
        one, other = GGUFFile(one), GGUFFile(other)
        assert list(one.tensors) == list(other.tensors)
        for name in one.tensors:
            np.testing.assert_allclose(one.array(name), other.array(name), rtol=FORMULA, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("kind", ["nf4", "awq"])
def test_logits_are_those_of_the_formula_in_double_precision(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, plain = request.getfixturevalue(kind)
    naive = NaiveModel(plain.config, {name: tensor.values for name, tensor in plain.tensors.items()})
    convert_checkpoint(source, tmp_path, decoder_type="f32", vision_type="f32")
    ids = golden("chat_text_fast")["ids"]
    with Model.load(tmp_path, exact=True) as model:
        embeddings = model.engine.decoder.embed(ids)
        model.engine.run(lambda: model.engine.decoder.prefill(embeddings))
        ours = model.engine.run(model.engine.decoder.logits)
    expected = naive.logits(plain.tensors["llm.model.embed_tokens.weight"].values[ids])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("kind", ["nf4", "awq"])
@pytest.mark.parametrize("decoder_type", [None, "q4_k_m", "q8_0", "f16", "bf16"])
def test_from_files_to_an_answer(
    kind: str, decoder_type: str | None, tmp_path: Path, images: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    """With a picture, in types of production; the greedy answer is that of the plain checkpoint's values."""
    source, plain = request.getfixturevalue(kind)
    convert_checkpoint(source, tmp_path / "ours", decoder_type=decoder_type)
    decoder_type = decoder_type or ("q4_1" if kind == "awq" else "q4_k_m")
    convert_checkpoint(plain.write(tmp_path / "plain"), tmp_path / "theirs", decoder_type=decoder_type)
    logits, answers = [], []
    for name in ("ours", "theirs"):
        with Model.load(tmp_path / name, exact=True) as model:
            message = [{"role": "user", "content": [images["square"], "What is this?"]}]
            logits.append(model.trace(message, 0).logits.astype(np.float64))
            answers.append(model.chat(message, greedy=True, max_tokens=12))
    assert answers[0].completion_tokens > 0
    assert answers[0].visual_tokens == 64
    cosine = logits[0] @ logits[1] / np.linalg.norm(logits[0]) / np.linalg.norm(logits[1])
    assert cosine > SAME_ANSWER.get(decoder_type, 0.9999)


# --- AWQ ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(256, 256), (8, 128), (40, 384)], ids=str)
@pytest.mark.parametrize("step", [1, 5, 16, 1000])
def test_awq_values_equal_the_formula(
    copy: CheckpointCopy, tmp_path: Path, shape: tuple[int, int], step: int
) -> None:
    weight = np.random.default_rng(shape[0]).normal(0.01, 0.02, shape).astype(np.float32)
    parts = q.awq_parts("llm.extra.weight", weight)
    expected = q.awq_values("llm.extra.weight", parts)
    found = read_back(with_matrix(copy, parts, tmp_path / "source"), "llm.extra.weight", step)
    np.testing.assert_allclose(found, expected, rtol=FORMULA, atol=0)
    assert np.abs(expected - weight).max() < 0.02, "the formula does not undo the quantiser"


def test_awq_integers_pass_into_q4_1_unchanged(awq: tuple[Path, CheckpointCopy], tmp_path: Path) -> None:
    """Scales exactly, and the minimum to 2^-11 of itself: 0.0073 steps; nothing where z·s is a float16."""
    source, _ = awq
    file = GGUFFile(convert_checkpoint(source, tmp_path).decoder)
    assert file.path.name == "ggml-model-Q4_1.gguf"
    copy = CheckpointCopy.of(source)
    module = GATE
    q_, z = (q.awq_integers(copy.tensors[f"{module}.{part}"]) for part in ("qweight", "qzeros"))
    scales = copy.tensors[f"{module}.scales"].values
    blocks = file.blocks("blk.1.ffn_gate.weight").reshape(768, 256 // 32, 20)
    integers = np.concatenate([blocks[:, :, 4:] & 15, blocks[:, :, 4:] >> 4], axis=2).reshape(768, 256)
    np.testing.assert_array_equal(integers, q_.T)
    d, m = (blocks[:, :, i : i + 2].copy().view(np.float16)[:, :, 0].astype(np.float64) for i in (0, 2))
    np.testing.assert_array_equal(d, np.repeat(scales.T, 4, axis=1))
    exact = -np.repeat(z.T * scales.T.astype(np.float64), 4, axis=1)
    assert (np.abs(m - exact) <= 15 / 2048 * np.abs(d)).all()
    powers = np.isin(np.repeat(z.T, 4, axis=1), (0, 1, 2, 4, 8))
    assert powers.any()
    np.testing.assert_array_equal(m[powers], exact[powers])


@pytest.mark.parametrize("group", [16, 32, 48, 64, 96, 128])
def test_integers_pass_into_q4_1_where_groups_are_whole_blocks(
    copy: CheckpointCopy, tmp_path: Path, group: int
) -> None:
    """A block has one scale: where groups end inside of one, values are rounded anew, as for any other source."""
    weight = np.random.default_rng(group).normal(0, 0.02, (8, 384)).astype(np.float32)
    tensor = Checkpoint(
        with_matrix(copy, q.awq_parts("llm.extra.weight", weight, group), tmp_path / "source")
    ).tensors["llm.extra.weight"]
    if group % 32:
        assert tensor.block_type is None
    else:
        assert tensor.block_type is not None
        assert tensor.block_type.name == "Q4_1"
        values = dequantize(tensor.blocks(0, 8), tensor.block_type)
        np.testing.assert_allclose(values, tensor.float_rows(0, 8), rtol=0, atol=0.01 * np.abs(weight).max())


def test_groups_that_end_inside_of_blocks_convert_to_q4_1(copy: CheckpointCopy, tmp_path: Path) -> None:
    """And to the values of the source, within the step of the type."""
    weight = copy.tensors[f"{GATE}.weight"].values.astype(np.float32)
    parts = q.awq_parts(f"{GATE}.weight", weight, 16)
    tensors = {name: tensor for name, tensor in copy.tensors.items() if name != f"{GATE}.weight"}
    source = CheckpointCopy(copy.files, {**tensors, **parts}).write(tmp_path / "source")
    file = GGUFFile(convert_checkpoint(source, tmp_path / "out", decoder_type="q4_1").decoder)
    found, expected = file.array("blk.1.ffn_gate.weight"), q.awq_values(f"{GATE}.weight", parts)
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 0.1


def test_only_a_checkpoint_of_integers_makes_q4_1_the_default(
    checkpoint: Path, awq: tuple[Path, CheckpointCopy], nf4: tuple[Path, CheckpointCopy], tmp_path: Path
) -> None:
    names = [
        convert_checkpoint(source, tmp_path / str(i)).decoder.name
        for i, source in enumerate((checkpoint, nf4[0], awq[0]))
    ]
    assert names == ["ggml-model-Q4_K_M.gguf", "ggml-model-Q4_K_M.gguf", "ggml-model-Q4_1.gguf"]


def test_q4_1_of_awq_is_closer_to_the_source_than_other_four_bit_types(
    awq: tuple[Path, CheckpointCopy], tmp_path: Path
) -> None:
    errors = {}
    for kind in ("q4_1", "q4_k_m", "q4_0"):
        files = convert_checkpoint(awq[0], tmp_path / kind, decoder_type=kind, report=True)
        errors[kind] = {tensor.name: tensor.error for tensor in files.reports[0].tensors}["blk.1.ffn_gate.weight"]
    assert errors["q4_1"] < 6e-4
    assert min(errors["q4_k_m"], errors["q4_0"]) > 80 * errors["q4_1"]


# --- damages --------------------------------------------------------------------------------------------------


def refuse(copy: CheckpointCopy, folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        convert_checkpoint(copy.write(folder / "source"), folder / "out")
    assert str(caught.value).endswith(".")
    assert not (folder / "out").exists()


def state_with(name: str, copy: CheckpointCopy, **changes: Any) -> None:
    key = f"{name}.quant_state.bitsandbytes__nf4"
    state = json.loads(copy.tensors[key].raw) | changes
    text = json.dumps(state).encode()
    copy.tensors[key] = Stored("U8", (len(text),), text)


NF4_NAME = f"{GATE}.weight"
NF4_DAMAGES = {
    "no state text": (
        lambda c: c.tensors.update({f"{NF4_NAME}.quant_state.bitsandbytes__nf4": Stored("U8", (2,), b"[]")}),
        "quant_state is no JSON object",
    ),
    "unknown kind": (
        lambda c: c.tensors.update({f"{NF4_NAME}.quant_state.bitsandbytes__int8": Stored("U8", (2,), b"{}")}),
        "'int8', expected nf4 or fp4",
    ),
    "shape of three": (lambda c: state_with(NF4_NAME, c, shape=[2, 2, 2]), "expected two sizes"),
    "huge shape": (lambda c: state_with(NF4_NAME, c, shape=[1 << 40, 2]), "expected two sizes"),
    "other shape": (lambda c: state_with(NF4_NAME, c, shape=[768, 255]), "bytes for 195840 values"),
    "transposed": (lambda c: state_with(NF4_NAME, c, shape=[256, 768]), r"has shape \(256, 768\), expected"),
    "no block size": (lambda c: state_with(NF4_NAME, c, blocksize=None), "blocksize is None"),
    "odd block size": (lambda c: state_with(NF4_NAME, c, blocksize=63), "blocksize is 63"),
    "other block size": (lambda c: state_with(NF4_NAME, c, blocksize=128), "holds 12 of F32, expected 6"),
    "offset is text": (lambda c: state_with(NF4_NAME, c, nested_offset="0"), "nested_offset is 0, expected a number"),
    "table missing": (lambda c: c.tensors.pop(f"{NF4_NAME}.quant_map"), "quant_map holds nothing"),
    "maxima missing": (lambda c: c.tensors.pop(f"{NF4_NAME}.absmax"), "absmax holds nothing"),
    "weight missing": (lambda c: c.tensors.pop(NF4_NAME), f"lacks {NF4_NAME}"),
    "state missing": (
        lambda c: c.tensors.pop(f"{NF4_NAME}.quant_state.bitsandbytes__nf4"),
        f"{NF4_NAME}.* is stored as U8",
    ),
}


@pytest.mark.parametrize("name", NF4_DAMAGES)
def test_damaged_nf4(copy: CheckpointCopy, tmp_path: Path, name: str) -> None:
    change, match = NF4_DAMAGES[name]
    quantised, _ = q.nf4_copy(copy)
    change(quantised)
    refuse(quantised, tmp_path, match)


AWQ_DAMAGES = {
    "zeros missing": (lambda c: c.tensors.pop(f"{GATE}.qzeros"), "qzeros is missing, expected a matrix of I32"),
    "scales in float32": (
        lambda c: c.tensors.update({f"{GATE}.scales": Stored("F32", (2, 768), bytes(4 * 2 * 768))}),
        "scales is F32 of shape",
    ),
    "GPTQ": (
        lambda c: c.tensors.update({f"{GATE}.g_idx": Stored("I32", (256,), bytes(1024))}),
        "quantised by GPTQ",
    ),
    "groups that do not fit": (
        lambda c: c.tensors.update({f"{GATE}.scales": Stored("F16", (3, 768), bytes(2 * 3 * 768))}),
        "do not fit each other",
    ),
    "other sizes": (
        lambda c: c.tensors.update(q.awq_parts(f"{GATE}.weight", np.ones((256, 256), np.float32))),
        r"has shape \(256, 256\), expected \(768, 256\)",
    ),
    "scale that is no number": (
        lambda c: c.tensors.update({f"{GATE}.scales": Stored("F16", (2, 768), b"\x00\x7c" * 2 * 768)}),
        "too large for blocks of Q4_1 or no numbers",
    ),
}


@pytest.mark.parametrize("name", AWQ_DAMAGES)
def test_damaged_awq(copy: CheckpointCopy, tmp_path: Path, name: str) -> None:
    change, match = AWQ_DAMAGES[name]
    quantised, _ = q.awq_copy(copy)
    change(quantised)
    with pytest.raises(CheckpointError, match=match):
        convert_checkpoint(quantised.write(tmp_path / "source"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_parts_changed_at_random_are_read_or_refused(copy: CheckpointCopy, tmp_path: Path) -> None:
    """Shapes, dtypes and states of quantised matrices, altered: our error or values, never another exception."""
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    weight = np.random.default_rng(0).normal(0, 1, (16, 128)).astype(np.float32)
    for number in range(400):
        parts = q.nf4_parts("x.weight", weight, double=rng.random() < 0.5) | q.awq_parts("y.weight", weight)
        for name in rng.sample(list(parts), rng.choice([0, 1, 2])):
            old = parts[name]
            if "quant_state" in name:
                text = bytearray(old.raw)
                text[rng.randrange(len(text))] = rng.randrange(256)
                parts[name] = Stored("U8", old.shape, bytes(text))
            elif rng.random() < 0.3:
                del parts[name]
            else:
                size = rng.choice([0, 1, 2, 16, 128, 256])
                parts[name] = rng.choice(
                    [Stored("U8", (size,), bytes(size)), Stored("F32", (1, size), bytes(4 * size))]
                )
        source = CheckpointCopy(copy.files, parts).write(tmp_path / str(number))
        try:
            for tensor in Checkpoint(source).tensors.values():
                assert tensor.float_rows(0, tensor.n_rows).size == tensor.n_rows * tensor.row_length
            outcomes["read"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 80, outcomes
