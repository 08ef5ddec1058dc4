"""Checkpoints of bitsandbytes and AutoAWQ, and LoRA folders, made and read by their formulas in plain NumPy.

Nothing here is shared with the converter. What the libraries themselves write and compute is in
`converters/test_reference_tools.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_copies import CheckpointCopy, Stored, shard_bytes, stored

Array = np.ndarray
Parts = dict[str, Stored]
Pairs = dict[str, tuple[Array, Array]]

# Quantiles of a normal distribution, scaled to -1 .. 1; bitsandbytes' table.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
NESTED = np.sort(np.concatenate([-np.geomspace(1e-4, 1, 127), [0.0], np.geomspace(1e-4, 1, 128)])).astype(np.float32)
BLOCK, NESTED_BLOCK, GROUP = 64, 256, 128
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NOT_NF4 = ("out_proj", "kv_proj", "lm_head")


def is_decoder_linear(name: str) -> bool:
    return name.startswith("llm.model.layers.") and name.endswith("_proj.weight")


def is_nf4_linear(name: str) -> bool:
    """What the official script quantises: every Linear whose name holds none of three words."""
    linear = name.endswith(("_proj.weight", "fc1.weight", "fc2.weight"))
    return linear and not any(word in name for word in NOT_NF4)


def nearest(values: Array, table: Array) -> Array:
    return np.abs(values[..., None] - table).argmin(-1)


# --- bitsandbytes ---------------------------------------------------------------------------------------------


def nf4_parts(name: str, weight: Array, *, double: bool = True, table: Array = NF4, block: int = BLOCK) -> Parts:
    """The tensors that bitsandbytes stores for a matrix."""
    flat = weight.reshape(-1).astype(np.float32)
    n_blocks = -(-flat.size // block)
    padded = np.zeros(n_blocks * block, np.float32)
    padded[: flat.size] = flat
    blocks = padded.reshape(n_blocks, block)
    maxima = np.abs(blocks).max(1)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16"}
    state["shape"] = list(weight.shape)
    parts = {f"{name}.quant_map": stored(table)}
    if double:
        offset = float(np.float32(maxima.mean()))
        n_nested = -(-n_blocks // NESTED_BLOCK)
        centred = np.zeros(n_nested * NESTED_BLOCK, np.float32)
        centred[:n_blocks] = maxima - offset
        scales = np.maximum(np.abs(centred.reshape(n_nested, -1)).max(1), np.float32(1e-12))  # one block: 0
        codes = nearest(centred.reshape(n_nested, -1) / scales[:, None], NESTED).reshape(-1)[:n_blocks]
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_offset": offset, "nested_dtype": "float32"}
        parts[f"{name}.absmax"] = Stored("U8", (n_blocks,), codes.astype(np.uint8).tobytes())
        parts[f"{name}.nested_absmax"] = stored(scales)
        parts[f"{name}.nested_quant_map"] = stored(NESTED)
    else:
        parts[f"{name}.absmax"] = stored(maxima)
    codes = nearest(blocks / maxima[:, None], table).reshape(-1)[: flat.size + flat.size % 2].astype(np.uint8)
    packed = codes[0::2] << 4 | codes[1::2]
    text = json.dumps(state).encode()
    parts[name] = Stored("U8", (len(packed), 1), packed.tobytes())
    parts[f"{name}.quant_state.bitsandbytes__nf4"] = Stored("U8", (len(text),), text)
    return parts


def nf4_values(name: str, parts: Parts) -> Array:
    """The formula, value by value: quant_map[nibble] · (nested_quant_map[absmax] · nested_absmax + nested_offset)."""
    state = json.loads(parts[f"{name}.quant_state.bitsandbytes__nf4"].raw)
    table, (rows, columns) = parts[f"{name}.quant_map"].values, state["shape"]
    packed = np.frombuffer(parts[name].raw, np.uint8)
    index = np.arange(rows * columns)
    nibbles = np.where(index % 2 == 0, packed[index // 2] >> 4, packed[index // 2] & 15)
    block = index // state["blocksize"]
    if f"{name}.nested_absmax" in parts:
        codes = np.frombuffer(parts[f"{name}.absmax"].raw, np.uint8)
        nested = parts[f"{name}.nested_absmax"].values[block // state["nested_blocksize"]]
        maxima = parts[f"{name}.nested_quant_map"].values[codes[block]] * nested + np.float32(state["nested_offset"])
    else:
        maxima = parts[f"{name}.absmax"].values[block]
    return (table[nibbles] * maxima).reshape(rows, columns)


def nf4_copy(copy: CheckpointCopy, *, double: bool = True) -> tuple[CheckpointCopy, CheckpointCopy]:
    """A checkpoint as the official int4 one is, and the plain one with the same values."""
    return _quantised(
        copy,
        is_nf4_linear,
        lambda name, weight: nf4_parts(name, weight, double=double),
        nf4_values,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    )


# --- AutoAWQ --------------------------------------------------------------------------------------------------


def awq_parts(name: str, weight: Array, group: int = GROUP) -> Parts:
    """The tensors that AutoAWQ stores for a matrix [o, i]."""
    module = name.removesuffix(".weight")
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // group, group)
    low, high = groups.min(2), groups.max(2)
    scales = np.maximum((high - low) / 15, 1e-5).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales.astype(np.float32)), 0, 15).astype(np.int64)
    integers = np.clip(np.rint(groups / scales.astype(np.float32)[:, :, None]) + zeros[:, :, None], 0, 15)
    return {
        f"{module}.qweight": _words(integers.reshape(rows, columns).astype(np.int64).T),
        f"{module}.qzeros": _words(zeros.T),
        f"{module}.scales": Stored("F16", (columns // group, rows), np.ascontiguousarray(scales.T).tobytes()),
    }


def _words(integers: Array) -> Stored:
    """[n, o] of 0 to 15 → int32 [n, o / 8], nibble k holding output 8c + ORDER[k]."""
    n, outputs = integers.shape
    words = np.zeros((n, outputs // 8), np.uint32)
    for k, place in enumerate(ORDER):
        words |= integers[:, place::8].astype(np.uint32) << np.uint32(4 * k)
    return Stored("I32", words.shape, words.tobytes())


def awq_integers(part: Stored) -> Array:
    """int32 [n, o / 8] → [n, o], one output after another."""
    words = np.frombuffer(part.raw, np.uint32).reshape(part.shape)
    integers = np.empty((part.shape[0], 8 * part.shape[1]), np.int64)
    for output in range(integers.shape[1]):
        integers[:, output] = words[:, output // 8] >> np.uint32(4 * ORDER.index(output % 8)) & np.uint32(15)
    return integers


def awq_values(name: str, parts: Parts) -> Array:
    """The reference's formula: W[o, i] = (q - z) · scale."""
    module = name.removesuffix(".weight")
    q, z = awq_integers(parts[f"{module}.qweight"]), awq_integers(parts[f"{module}.qzeros"])
    scales = parts[f"{module}.scales"].values
    spread = len(q) // len(z)
    values = (q - np.repeat(z, spread, axis=0)) * np.repeat(scales, spread, axis=0)
    return np.ascontiguousarray(values.T, np.float32)


def awq_copy(copy: CheckpointCopy) -> tuple[CheckpointCopy, CheckpointCopy]:
    """A checkpoint as AutoAWQ writes it, and the plain one with the same values; the rest is float16."""
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    for name, tensor in copy.tensors.items():
        copy.tensors[name] = stored(tensor.values, "F16")
    return _quantised(copy, is_decoder_linear, awq_parts, awq_values, settings)


def _quantised(
    copy: CheckpointCopy, chosen: Any, make: Any, read: Any, settings: dict[str, Any]
) -> tuple[CheckpointCopy, CheckpointCopy]:
    quantised, plain = dict(copy.tensors), dict(copy.tensors)
    for name, tensor in copy.tensors.items():
        if chosen(name):
            parts = make(name, tensor.values)
            del quantised[name]
            quantised |= parts
            plain[name] = stored(read(name, parts))
    config = {**copy.config, "quantization_config": settings}
    return CheckpointCopy({**copy.files, "config.json": config}, quantised), CheckpointCopy(copy.files, plain)


# --- PEFT -----------------------------------------------------------------------------------------------------


def random_lora(copy: CheckpointCopy, names: list[str], rank: int = 4, seed: int = 0) -> Pairs:
    """A and B for some matrices, large enough to change answers."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for name in names:
        outputs, *inputs = copy.tensors[name].shape
        a = rng.normal(0, 1 / np.sqrt(np.prod(inputs)), (rank, *inputs))
        pairs[name] = (a.astype(np.float32), rng.normal(0, 0.5, (outputs, rank)).astype(np.float32))
    return pairs


def write_lora(folder: Path, tensors: Parts, **settings: Any) -> Path:
    """A folder as PEFT saves it; the names lack `base_model.model.`."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_rslora": False, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(shard_bytes(named))
    return folder


def lora_tensors(pairs: Pairs) -> Parts:
    """Pairs under PEFT's names."""
    tensors = {}
    for name, (a, b) in pairs.items():
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.lora_A.weight": stored(a), f"{module}.lora_B.weight": stored(b)}
    return tensors


def merged_copy(copy: CheckpointCopy, pairs: Pairs, scale: float) -> CheckpointCopy:
    """The plain checkpoint with scale · B · A added."""
    tensors = dict(copy.tensors)
    for name, (a, b) in pairs.items():
        base = tensors[name].values.astype(np.float64)
        change = scale * (b.astype(np.float64) @ a.reshape(len(a), -1).astype(np.float64))
        tensors[name] = stored(base + change.reshape(base.shape))
    return CheckpointCopy(copy.files, tensors)
