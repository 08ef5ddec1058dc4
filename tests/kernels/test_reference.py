"""Every public kernel has a definition in NumPy, and the definitions that nothing else here stands on are right."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

import edge_kernels
from edge_kernels.reference import attention, decoder, gguf_blocks, operations

PACKAGE = Path(edge_kernels.__file__).parent

# Public function of a kernel module → what defines it; what packs an operand has the definition of its product, or of
# the rounding it does.
DEFINITIONS = {
    "linear.float32.linear": operations.linear,
    "linear.float32.pack_weight": operations.linear,
    "linear.dispatch.linear_float": operations.linear,
    "linear.dispatch.pack_float_weight": operations.linear,
    "linear.bf16_split.linear_split": operations.linear,
    "linear.bf16_split.pack_split": operations.linear,
    "linear.int8.linear_int8": operations.linear_int8,
    "linear.int8.linear_int8_quantized": operations.linear_int8_quantized,
    "linear.int8_weights.pack_weight_int8": operations.quantize_weight,
    "linear.int8_rows.quantize_rows": operations.quantize_rows,
    "linear.int8_rows.layer_norm_quantized": operations.layer_norm_quantized,
    "linear.gguf_blocks.linear_blocks": gguf_blocks.linear_blocks,
    "linear.gguf_int8.linear_gguf": gguf_blocks.linear_gguf,
    "linear.gguf_blocks.pack_rows": attention.round_to_bf16,
    "linear.gguf_blocks.pack_gated": decoder.gated,
    "attention.float32.attention": operations.attention,
    "attention.int16.attention_int16": attention.attention_int16,
    "attention.bf16.attention_bf16": attention.attention_bf16,
    "attention.qkv_fused.self_attention": attention.self_attention,
    "attention.qkv_fused.pack_heads": operations.quantize_weight,
    "attention.causal.attention_causal": decoder.attention_causal,
    "rows.norm.layer_norm": operations.layer_norm,
    "rows.patch_embed.patch_embed": operations.patch_embed,
    "rows.decoder_rows.rms_norm": decoder.rms_norm,
    "rows.decoder_rows.norm_and_rotate": decoder.norm_and_rotate,
}

SIZES = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "Q8_0": 272}


# Public functions that compute nothing: they choose blocks, check arguments, allocate.
PLUMBING = {
    "linear.tasks.even_block",
    "linear.tasks.product_worker",
    "linear.tasks.what_follows",
    "attention.blocks.plan",
    "linear.tasks.task_grid",
    "linear.tasks.result_rows",
    "linear.int8_rows.empty_panels",
}


def public_functions() -> set[str]:
    """What programs call: functions without an underscore, and without a decorator, which makes code for kernels."""
    return {
        f"{room}.{path.stem}.{node.name}"
        for room in ("linear", "attention", "rows")
        for path in (PACKAGE / room).glob("*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not node.decorator_list
    }


def test_every_public_kernel_is_defined():
    assert public_functions() == set(DEFINITIONS) | PLUMBING
    for name in DEFINITIONS:
        module, function = name.rsplit(".", 1)
        assert callable(getattr(import_module(f"edge_kernels.{module}"), function))


@pytest.mark.parametrize("kind", SIZES)
def test_blocks_are_unpacked_as_the_gguf_package_does(kind):
    """All bytes are random but the float16 factors: theirs are not NaN or infinite."""
    rng = np.random.default_rng(0)
    n, k = 37, 1024
    blocks = rng.integers(0, 256, (n * k // 256, SIZES[kind]), np.uint8)
    for first in {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "Q8_0": range(0, 272, 34)}[kind]:
        factors = rng.uniform(-1e-2, 1e-2, len(blocks)).astype(np.float16)
        blocks[:, first : first + 2] = factors.view(np.uint8).reshape(-1, 2)
    expected = dequantize(blocks.reshape(n, -1), GGMLQuantizationType[kind])
    np.testing.assert_array_equal(gguf_blocks.unpack_blocks(blocks.reshape(-1), kind, n, k), expected)


def test_products_of_blocks_round_both_sides():
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (6, 272), np.uint8)
    blocks.reshape(-1, 34)[:, :2] = np.full(1, 2.0**-10, np.float16).view(np.uint8)
    x = np.zeros((4, 512), np.float32)
    x[0, 3] = 1
    x[1, 3] = 1 + 2.0**-8  # half a step: away from zero
    x[2, 3] = -1 - 2.0**-8
    x[3, [3, 300]] = 1
    weight = gguf_blocks.unpack_blocks(blocks.reshape(-1), "Q8_0", 3, 512)  # integers of 8 bits: bfloat16 has them
    found = gguf_blocks.linear_blocks(x, blocks.reshape(-1), "Q8_0", 3, residual=np.ones((4, 3), np.float32))
    factor = 1 + 2.0**-7
    expected = np.stack([weight[:, 3], factor * weight[:, 3], -factor * weight[:, 3], weight[:, 3] + weight[:, 300]])
    np.testing.assert_array_equal(found, expected.astype(np.float32) + 1)


def test_ties_to_even_and_what_is_not_finite():
    x = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, np.inf, -np.inf, np.nan, 0.0], np.float32)
    expected = np.array([1, 1 + 2.0**-6, -1, np.inf, -np.inf, np.nan, 0.0], np.float32)
    np.testing.assert_array_equal(gguf_blocks.round_to_even_bf16(x), expected)
