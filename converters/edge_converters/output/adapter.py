"""The decoder's part of a LoRA → a GGUF adapter that llama.cpp adds to the decoder as it runs.

The pairs are named after the tensors they change, `blk.0.attn_q.weight.lora_a` [r, inputs] and `.lora_b` [outputs,
r], and llama.cpp multiplies their product by `adapter.lora.alpha` / r. Where a module has another scale, the ratio
goes into B. An adapter holds products of two matrices and nothing else, and llama.cpp has adapters for the decoder
alone: everything else a LoRA changes has to be merged.
"""

from __future__ import annotations

import math

import numpy as np
from gguf import GGUFWriter

from edge_converters.plan import recipes
from edge_converters.plan.planned_tensor import PlannedTensor
from edge_converters.plan.tensor_names import decoder_names
from edge_converters.sources.checkpoint import Checkpoint
from edge_converters.sources.lora import DECODER, Lora
from edge_converters.sources.safetensors import Float32, StoredTensor
from edge_runtime.errors import CheckpointError

KEY_TYPE, KEY_ALPHA = "adapter.type", "adapter.lora.alpha"


def plan_adapter(lora: Lora, checkpoint: Checkpoint) -> list[PlannedTensor]:
    """Plan the tensors of the adapter.

    Raises
    ------
    CheckpointError
        When the LoRA changes the decoder in a way that an adapter cannot express.
    """
    tied = bool(checkpoint.config.get("tie_word_embeddings")) and "llm.lm_head.weight" not in checkpoint.tensors
    names = decoder_names(checkpoint.size("num_hidden_layers"), tied)
    whole = [name for name in lora.replaced if name.startswith(DECODER)]
    changes = {name: change for name, change in lora.changes.items() if name.startswith(DECODER)}
    odd = [name for name, change in changes.items() if change.is_embedding or change.magnitude or name not in names]
    if whole or odd:
        raise CheckpointError(
            f"The LoRA changes {(whole + odd)[0]} by more than a product of two matrices, which no adapter can hold; "
            "merge it with --lora."
        )
    if not changes:
        raise CheckpointError(
            "The LoRA leaves the decoder as it is, so there is no adapter to write; merge it with --lora."
        )
    if lora.alpha == 0:  # llama.cpp takes zero to mean "no alpha given"
        raise CheckpointError("The LoRA has an alpha of 0 and changes nothing; train it with another lora_alpha.")
    plan = []
    for source, name in names.items():
        if change := changes.get(source):
            ratio = change.scale * change.rank / lora.alpha
            plan.append(_planned(f"{name}.lora_a", change.a, 1.0))
            plan.append(_planned(f"{name}.lora_b", change.b, 1.0 if _is_one(ratio) else ratio))
    return plan


def _is_one(ratio: float) -> bool:
    return math.isclose(ratio, 1.0, rel_tol=1e-12)


def _planned(name: str, tensor: StoredTensor, factor: float) -> PlannedTensor:
    def rows(start: int, stop: int) -> Float32:
        return tensor.float_rows(start, stop) * np.float32(factor)

    if factor == 1.0:
        return PlannedTensor(name, tensor.shape, recipes.LOSSLESS[tensor.dtype], tensor.float_rows, tensor.rows)
    return PlannedTensor(name, tensor.shape, recipes.Q.F32, rows)


def adapter_metadata(lora: Lora, writer: GGUFWriter) -> None:
    """Add the keys of an adapter file."""
    writer.add_type("adapter")
    writer.add_name(lora.name)
    writer.add_string(KEY_TYPE, "lora")
    writer.add_float32(KEY_ALPHA, lora.alpha)
