"""`verify_gguf` finds what a file must not hold: each test damages a good file the way a bug would."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_converters import DECODER_TYPES, VISION_TYPES
from edge_converters.convert import Converted
from edge_converters.output.verify import sampled_error, verify_gguf
from edge_converters.plan.tensors import plan_decoder, plan_vision
from edge_converters.sources.checkpoint import Checkpoint
from edge_runtime.errors import CheckpointError
from edge_runtime.weights.gguf_file import GGUFFile

PROJ = "resampler.proj.weight"
BLOCK_BYTES = 34  # Q8_0: a float16 scale and 32 values

Damage = Callable[[dict[str, np.ndarray]], None]


def damaged(path: Path, folder: Path, damage: Damage) -> Path:
    """A copy of a GGUF file whose tensors' bytes `damage` may change in place."""
    target = folder / path.name
    shutil.copyfile(path, target)
    infos = GGUFFile(path).tensors
    data = np.memmap(target, np.uint8, "r+")
    views = {
        name: data[info.offset : info.offset + info.n_bytes].reshape(info.n_rows, -1) for name, info in infos.items()
    }
    damage(views)
    data.flush()
    return target


def swap(one: str, other: str) -> Damage:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        tensors[one][:], tensors[other][:] = tensors[other].copy(), tensors[one].copy()

    return damage


def transpose(name: str, dtype: str) -> Damage:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        values = tensors[name].view(dtype)
        values[:] = values.T.copy()

    return damage


def flip_block(tensors: dict[str, np.ndarray]) -> None:
    tensors[PROJ][0, BLOCK_BYTES + 2 : 2 * BLOCK_BYTES] ^= 0x80


def flip_scale(tensors: dict[str, np.ndarray]) -> None:
    tensors[PROJ][-1, 1] ^= 0x80  # the sign of the last row's first block


def spoil_scale(tensors: dict[str, np.ndarray]) -> None:
    tensors[PROJ][0, :2] = 0xFF  # NaN, which no comparison calls too large


def shift_rows(tensors: dict[str, np.ndarray]) -> None:
    tensors["v.blk.1.attn_q.weight"][:] = np.roll(tensors["v.blk.1.attn_q.weight"], 1, axis=0)


DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "transposed tensor": ("f16", transpose(PROJ, "<f2"), PROJ),
    "transposed float32 tensor": ("f32", transpose(PROJ, "<f4"), PROJ),
    "swapped q and k": (
        "q8_0",
        swap("resampler.attn.q.weight", "resampler.attn.k.weight"),
        "resampler.attn.q.weight",
    ),
    "swapped biases": ("q8_0", swap("resampler.attn.k.bias", "resampler.attn.v.bias"), "resampler.attn.k.bias"),
    "swapped layers": ("q8_0", swap("v.blk.0.ln1.bias", "v.blk.1.ln1.bias"), "v.blk.0.ln1.bias"),
    "flipped block": ("q8_0", flip_block, PROJ),
    "flipped scale": ("q8_0", flip_scale, PROJ),
    "rows moved by one": ("f16", shift_rows, "v.blk.1.attn_q.weight"),
    "rows moved by one in four bits": ("q4_0", shift_rows, "v.blk.1.attn_q.weight"),
    "swapped layers in padded rows": (
        "int4",
        swap("v.blk.0.ffn_up.weight", "v.blk.1.ffn_up.weight"),
        "v.blk.0.ffn_up.weight",
    ),
    "scale that is no number": ("int4", spoil_scale, PROJ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_wrong_values_are_found(
    checkpoint: Path, converted: Callable[[str, str], Converted], tmp_path: Path, name: str
) -> None:
    kind, damage, tensor = DAMAGES[name]
    good, plan = converted("f32", kind).mmproj, plan_vision(Checkpoint(checkpoint), VISION_TYPES[kind])
    verify_gguf(good, plan, good.name, types_may_differ=False)
    with pytest.raises(CheckpointError, match=f"{tensor} differs from the checkpoint by"):
        verify_gguf(damaged(good, tmp_path, damage), plan, good.name, types_may_differ=False)


@pytest.mark.parametrize("kind", ["q4_0", "q4_k_m", "q6_k"])
def test_wrong_rows_are_found_in_few_bits(
    checkpoint: Path, converted: Callable[[str, str], Converted], tmp_path: Path, kind: str
) -> None:
    good = converted(kind, "f32").decoder
    plan = plan_decoder(Checkpoint(checkpoint), DECODER_TYPES["bf16"])
    bad = damaged(good, tmp_path, swap("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"))
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_gate.weight differs"):
        verify_gguf(bad, plan, good.name, types_may_differ=True)


def test_wrong_types_shapes_and_names_are_found(checkpoint: Path, converted: Callable[[str, str], Converted]) -> None:
    source, file = Checkpoint(checkpoint), converted("f32", "f16").mmproj
    plan = plan_vision(source, VISION_TYPES["f16"])
    with pytest.raises(CheckpointError, match=r"was written as F16 .* expected F32"):
        verify_gguf(file, plan_vision(source, VISION_TYPES["f32"]), file.name, types_may_differ=False)
    flat = [replace(tensor, shape=(1, *tensor.shape)) if len(tensor.shape) == 1 else tensor for tensor in plan]
    with pytest.raises(CheckpointError, match=r"was written as F32 \(\d+,\), expected F32 \(1, \d+\)"):
        verify_gguf(file, flat, file.name, types_may_differ=False)
    with pytest.raises(CheckpointError, match=f"{plan[-1].name} is missing or unexpected"):
        verify_gguf(file, plan[:-1], file.name, types_may_differ=False)
    with pytest.raises(CheckpointError, match="is missing or unexpected"):
        verify_gguf(file, plan + plan_decoder(source, DECODER_TYPES["bf16"])[:1], file.name, types_may_differ=False)


@pytest.mark.parametrize("types_may_differ", [False, True])
@pytest.mark.parametrize("name", ["v.post_ln.bias", PROJ, "v.patch_embd.weight", "resampler.query"])
def test_wrong_shapes_are_found_whose_values_are_right(
    checkpoint: Path, converted: Callable[[str, str], Converted], name: str, types_may_differ: bool
) -> None:
    """As when an axis of length 1 is added or lost, or a kernel flattened: every row compares equal."""
    file = converted("f32", "f16").mmproj
    plan = {tensor.name: tensor for tensor in plan_vision(Checkpoint(checkpoint), VISION_TYPES["f16"])}
    verify_gguf(file, [*plan.values()], file.name, types_may_differ=types_may_differ)
    right = plan[name]
    wrong = (1, *right.shape) if len(right.shape) == 1 else (*right.shape, 1)
    if len(right.shape) > 2:
        wrong = (right.n_rows, right.n_columns)
    plan[name] = replace(right, shape=wrong)
    match = rf"{name} was written as \w+ {re.escape(str(right.shape))}, expected \w+ {re.escape(str(wrong))}"
    with pytest.raises(CheckpointError, match=match):
        verify_gguf(file, [*plan.values()], file.name, types_may_differ=types_may_differ)


def test_a_file_cut_short_is_found(
    checkpoint: Path, converted: Callable[[str, str], Converted], tmp_path: Path
) -> None:
    file = converted("f32", "f32").mmproj
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{file.name} cannot be read back .* cut short"):
        verify_gguf(cut, plan_vision(Checkpoint(checkpoint), VISION_TYPES["f32"]), file.name, types_may_differ=False)


def test_good_files_are_far_below_the_tolerances(
    checkpoint: Path, converted: Callable[[str, str], Converted]
) -> None:
    file = GGUFFile(converted("q8_0", "f32").decoder)
    for tensor in plan_decoder(Checkpoint(checkpoint), DECODER_TYPES["q8_0"]):
        assert sampled_error(file, tensor) < 0.01, tensor.name
