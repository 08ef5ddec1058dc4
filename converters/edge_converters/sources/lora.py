"""A LoRA folder as PEFT writes it → changed tensors of a checkpoint, or the decoder's part as a GGUF adapter.

For a matrix W [o, i] the folder holds A [r, i] and B [o, r]; the fine-tuned matrix is W + s·B·A with s = alpha / r,
or alpha / √r for rank-stabilised ones, where alpha and r may differ between modules. Embedding tables have A
[r, rows] and B [width, r], convolutions a kernel in A. DoRA also stores the length that each row of the sum gets.
Tensors that were trained whole (`modules_to_save`, biases) replace the checkpoint's.

Merged values are float32: PEFT rounds the sum to the model's bfloat16, which swallows small changes. An intermediate
file keeps them as float16; the error of its 11 bits is far below any block type's.
Source of the format: PEFT `LoraConfig` and `get_peft_model_state_dict`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edge_converters.sources.safetensors import FLOATS, Float32, SourceTensor, StoredTensor, float_array, read_index
from edge_runtime.errors import CheckpointError
from edge_runtime.system.text_files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 16 << 20
PREFIX = "base_model.model."
DECODER = "llm."
# MODULE.lora_A.weight, with ".default" before ".weight" where the adapter was saved with its name.
_PART = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(\.default)?(\.weight)?"
)
# PEFT settings that change what an adapter computes, with the value under which it is computed here.
_UNSUPPORTED = {
    "fan_in_fan_out": False,
    "lora_bias": False,
    "layer_replication": None,
    "alora_invocation_tokens": None,
}


@dataclass(frozen=True)
class Change:
    """The change of one tensor: scale · B · A."""

    a: StoredTensor
    """[r, inputs], or [r, rows] for an embedding table."""
    b: StoredTensor
    """[outputs, r], or [width, r] for an embedding table."""
    scale: float
    is_embedding: bool
    magnitude: StoredTensor | None = None
    """Lengths of the rows of the sum [outputs], DoRA only."""

    @property
    def rank(self) -> int:
        """Rank of the change."""
        return self.a.shape[0]

    def rows(self, start: int, stop: int) -> Float32:
        """Rows [start, stop) of the change: ndarray [shape=(stop - start, inputs), float32]."""
        a = self.a.float_rows(0, self.rank)
        if self.is_embedding:
            b = self.b.float_rows(0, self.b.n_rows)
            return np.float32(self.scale) * (a[:, start:stop].T @ b.T)
        return np.float32(self.scale) * (self.b.float_rows(start, stop) @ a)


@dataclass(frozen=True, eq=False)
class MergedTensor(SourceTensor):
    """A tensor with a change added to it."""

    base: SourceTensor
    change: Change

    def float_rows(self, start: int, stop: int) -> Float32:
        """Rows [start, stop) as float32."""
        rows: Float32 = self.base.float_rows(start, stop) + self.change.rows(start, stop)
        if self.change.magnitude is not None:
            wanted = float_array(self.change.magnitude).reshape(-1)[start:stop]
            rows *= (wanted / np.linalg.norm(rows, axis=1))[:, None]
        return rows


@dataclass
class Lora:
    """A LoRA folder, sorted by the tensors of a checkpoint that it changes."""

    name: str
    alpha: float
    changes: dict[str, Change] = field(default_factory=dict)
    """By the checkpoint's tensor name."""
    replaced: dict[str, StoredTensor] = field(default_factory=dict)

    def merged(self, tensors: dict[str, SourceTensor], *, decoder: bool = True) -> dict[str, SourceTensor]:
        """The tensors of a checkpoint with the changes merged, in everything or in all but the decoder."""
        result = tensors | {n: t for n, t in self.replaced.items() if decoder or not n.startswith(DECODER)}
        for name, change in self.changes.items():
            if decoder or not name.startswith(DECODER):
                base = result[name]
                result[name] = MergedTensor(name, "F32" if base.dtype == "F32" else "F16", base.shape, base, change)
        return result

    def touches_vision(self) -> bool:
        """Whether anything but the decoder was trained."""
        return any(not name.startswith(DECODER) for name in (*self.changes, *self.replaced))


def read_lora(folder: str | Path, tensors: dict[str, SourceTensor]) -> Lora:
    """Read a LoRA folder and check it against the tensors of a checkpoint.

    Raises
    ------
    CheckpointError
        When the folder is not a LoRA, is damaged, or belongs to another model.
    """
    folder = Path(folder)
    config = _config(folder)
    lora = Lora(folder.resolve().name, _number(config, "lora_alpha"))
    parts: dict[str, dict[str, StoredTensor]] = {}
    for stored in read_index([folder / WEIGHTS]).values():
        if stored.dtype not in FLOATS:
            raise CheckpointError(f"{WEIGHTS} holds {stored.name} as {stored.dtype}, expected F32, F16 or BF16.")
        if stored.name.endswith(".base_layer.weight"):
            continue  # PEFT also saves the unchanged weight below a changed head or embedding
        name = stored.name.removeprefix(PREFIX).replace(".base_layer", "")
        if match := _PART.fullmatch(name):
            parts.setdefault(match["module"], {})[match["part"]] = stored
        else:
            target = _known(re.sub(r"\.modules_to_save(\.default)?", "", name), tensors, stored.name)
            _same_shape(stored, stored.shape, tensors[target].shape, target)
            lora.replaced[target] = dataclasses.replace(stored, name=target)
    for module, found in parts.items():
        target = _target(module, tensors)
        lora.changes[target] = _change(module, found, config, tensors[target])
    if not lora.changes and not lora.replaced:
        raise CheckpointError(f"{folder / WEIGHTS} changes nothing; expected the weights of a LoRA.")
    return lora


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / CONFIG, MAX_CONFIG_BYTES)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {CONFIG}; expected a LoRA folder as PEFT or LLaMA-Factory saves it."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG} is not readable JSON ({error}); save the LoRA again.") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise CheckpointError(f"{folder / CONFIG} is of peft_type {str(kind)[:40]!r}; only LORA can be used.")
    for key, expected in _UNSUPPORTED.items():
        if config.get(key) not in (expected, None):
            raise CheckpointError(
                f"{CONFIG} sets {key} to {str(config[key])[:40]}, which is not supported; merge the LoRA with PEFT's "
                "merge_and_unload and convert the merged checkpoint."
            )
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder} has no {WEIGHTS}; if it holds adapter_model.bin, save the LoRA again with "
            "safe_serialization=True."
        )
    return config


def _number(config: dict[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, float | int) or not math.isfinite(value):
        raise CheckpointError(
            f"{CONFIG} holds {str(value)[:40]!r} for {key}, expected a number; save the LoRA again."
        )
    return float(value)


def _known(name: str, tensors: dict[str, SourceTensor], given: str) -> str:
    """Name of a tensor of the checkpoint; a LoRA of the bare decoder leaves `llm.` out."""
    for candidate in (name, DECODER + name):
        if candidate in tensors:
            return candidate
    raise CheckpointError(
        f"The LoRA changes {given}, which the checkpoint does not have; use the checkpoint it was trained on."
    )


def _target(module: str, tensors: dict[str, SourceTensor]) -> str:
    if module.endswith("resampler.attn"):  # PyTorch's attention keeps the three input products in one tensor
        return _known(f"{module}.in_proj_weight", tensors, module)
    return _known(f"{module}.weight", tensors, module)


def _change(module: str, found: dict[str, StoredTensor], config: dict[str, Any], base: SourceTensor) -> Change:
    is_embedding = "embedding_A" in found or "embedding_B" in found
    a, b = (found.get(f"embedding_{part}" if is_embedding else part) for part in "AB")
    if a is None or b is None or len(a.shape) < 2 or len(b.shape) < 2:
        raise CheckpointError(f"The LoRA lacks one of the two matrices of {module}; save it again.")
    rank = a.shape[0]
    if is_embedding:
        shape: tuple[int, ...] = (a.shape[1], b.shape[0])
    else:
        shape = (b.shape[0], *a.shape[1:])
    if b.shape[1] != rank or math.prod(b.shape) != b.shape[0] * rank or not rank:
        raise CheckpointError(
            f"The two matrices of {module} in the LoRA have shapes {a.shape} and {b.shape}; save it again."
        )
    _same_shape(a, shape, base.shape, base.name)
    magnitude = found.get("magnitude_vector")
    if (magnitude is not None) != bool(config.get("use_dora")) or (magnitude is not None and is_embedding):
        raise CheckpointError(
            f"The LoRA of {module} does not fit its use_dora setting; merge it with PEFT's merge_and_unload instead."
        )
    if magnitude is not None and magnitude.row_length * magnitude.n_rows != base.n_rows:
        raise CheckpointError(
            f"The DoRA lengths of {module} have shape {magnitude.shape}, expected ({base.n_rows},)."
        )
    return Change(a, b, _scale(module, rank, config), is_embedding, magnitude)


def _scale(module: str, rank: int, config: dict[str, Any]) -> float:
    """Scale of one module, alpha / r; PEFT takes the first pattern that matches the end of the module's name."""
    alpha = _number(config, "lora_alpha")
    patterns = config.get("alpha_pattern") or {}
    for pattern in patterns if isinstance(patterns, dict) else ():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error:
            raise CheckpointError(f"alpha_pattern of {CONFIG} holds {pattern[:40]!r}, which is no pattern.") from None
        if matches:
            alpha = _number(patterns, pattern)
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _same_shape(stored: StoredTensor, shape: tuple[int, ...], expected: tuple[int, ...], name: str) -> None:
    if shape != expected:
        raise CheckpointError(
            f"The LoRA's {stored.name} fits a tensor of shape {shape}, but {name} has {expected}; use the checkpoint "
            "it was trained on."
        )
