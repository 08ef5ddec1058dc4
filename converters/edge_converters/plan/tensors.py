"""Which tensors a model of the checkpoint's configuration has, with their shapes, types and sources.

Every shape is checked against config.json before a byte is written. A tensor that belongs to no part of the model is
an error: dropping it silently might lose part of a fine-tune.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from edge_converters.plan import recipes
from edge_converters.plan import tensor_names as names
from edge_converters.plan.planned_tensor import PlannedTensor, copied
from edge_converters.sources.checkpoint import Checkpoint
from edge_runtime.errors import CheckpointError
from edge_runtime.vision.resampler import pos2d_table

POSITIONS_SIDE = 70  # side of the position table that llama.cpp expects in the file, whatever the model

MIN_IMPORTANCE = 0.01  # of a column, relative to the mean

Shape = tuple[int, ...]
Types = Mapping[str, GGMLQuantizationType]


def n_vision_layers(checkpoint: Checkpoint) -> int:
    """Layers of the vision tower that are used."""
    n = checkpoint.size("vision_config", "num_hidden_layers")
    # The configuration class defaults to true: without the key, the last layer is dropped.
    return n - 1 if checkpoint.config.get("drop_vision_last_layer", True) else n


def refuse_unknown_tensors(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint with tensors that would be dropped.

    Raises
    ------
    CheckpointError
        Naming one of them.
    """
    known = set(names.decoder_names(checkpoint.size("num_hidden_layers"), tied=False))
    known |= set(names.vision_names(checkpoint.size("vision_config", "num_hidden_layers")))
    known |= {*names.RESAMPLER, *names.RESAMPLER_IN_PROJ, names.RESAMPLER_PROJ[0]}
    unknown = [n for n in checkpoint.tensors if n not in known and not n.endswith(names.IGNORED_SUFFIXES)]
    if unknown:
        raise CheckpointError(
            f"The checkpoint holds tensors that MiniCPM-V 4.5 does not have ({len(unknown)}, such as {unknown[0]}); "
            "for a LoRA, give its folder with --lora."
        )


def plan_decoder(
    checkpoint: Checkpoint, recipe: recipes.DecoderType, overrides: Types | None = None
) -> list[PlannedTensor]:
    """Plan the decoder file, or, if the recipe is a mix, the intermediate file that llama.cpp quantizes.

    Parameters
    ----------
    overrides : types of single tensors, by GGUF name.
    """
    chosen = overrides or {}
    size = checkpoint.size
    hidden, vocabulary, mlp = size("hidden_size"), size("vocab_size"), size("intermediate_size")
    n_heads, n_kv = size("num_attention_heads"), size("num_key_value_heads")
    width = size("head_dim", default=hidden // n_heads)
    shapes: dict[str, Shape] = {
        "token_embd": (vocabulary, hidden),
        "output": (vocabulary, hidden),
        "attn_q_norm": (width,),
        "attn_k_norm": (width,),
        "attn_q": (n_heads * width, hidden),
        "attn_k": (n_kv * width, hidden),
        "attn_v": (n_kv * width, hidden),
        "attn_output": (hidden, n_heads * width),
        "ffn_gate": (mlp, hidden),
        "ffn_up": (mlp, hidden),
        "ffn_down": (hidden, mlp),
    }
    plan = []
    tied = bool(checkpoint.config.get("tie_word_embeddings")) and "llm.lm_head.weight" not in checkpoint.tensors
    for source, name in names.decoder_names(size("num_hidden_layers"), tied).items():
        shape = shapes.get(name.split(".")[-2], (hidden,))
        _expect(checkpoint, source, shape)
        plan.append(copied(checkpoint, source, name, _decoder_type(checkpoint, source, name, recipe, chosen)))
    return plan


def _decoder_type(
    checkpoint: Checkpoint, source: str, name: str, recipe: recipes.DecoderType, overrides: Types
) -> GGMLQuantizationType:
    tensor = checkpoint.tensors[source]
    if len(tensor.shape) < 2:
        return recipes.Q.F32
    if recipe.matrix is not None:
        return overrides.get(name) or recipes.decoder_tensor_type(tensor.shape, recipe.matrix)
    # llama.cpp copies tensors that already have the wanted type, so the source's integers pass its quantizer intact.
    if name not in overrides and tensor.block_type is not None and tensor.block_type.name == recipe.label:
        return tensor.block_type
    return recipes.LOSSLESS[tensor.dtype]


def plan_vision(
    checkpoint: Checkpoint, vision: recipes.VisionType, overrides: Types | None = None
) -> list[PlannedTensor]:
    """Plan the mmproj file.

    Parameters
    ----------
    overrides : types of single tensors, by GGUF name.
    """
    size = checkpoint.size
    width, mlp = size("vision_config", "hidden_size"), size("vision_config", "intermediate_size")
    patch, hidden = size("patch_size", default=14), size("hidden_size")
    side = size("vision_config", "image_size", default=980) // patch
    shapes: dict[str, Shape] = {
        "v.patch_embd.weight": (width, 3, patch, patch),
        "v.position_embd.weight": (side * side, width),
        "ffn_down.weight": (mlp, width),
        "ffn_down.bias": (mlp,),
        "ffn_up.weight": (width, mlp),
        "resampler.query": (size("query_num"), hidden),
        "resampler.kv.weight": (hidden, width),
        "resampler.attn.out.weight": (hidden, hidden),
    }
    shapes |= {f"attn_{part}.weight": (width, width) for part in ("q", "k", "v", "out")}
    plan = []
    for source, name in (names.vision_names(n_vision_layers(checkpoint)) | names.RESAMPLER).items():
        vector = (hidden,) if name.startswith("resampler.") else (width,)
        shape = shapes.get(name) or shapes.get(".".join(name.split(".")[-2:]), vector)
        _expect(checkpoint, source, shape)
        plan.append(copied(checkpoint, source, name, recipes.vision_tensor_type(name, shape, vision)))
    plan += _plan_rearranged(checkpoint, hidden, vision)
    if vision.ours_alone:  # then nothing reads the positions
        plan = [tensor for tensor in plan if tensor.name != names.RESAMPLER_POSITIONS]
    chosen = overrides or {}
    plan = [dataclasses.replace(tensor, type=chosen.get(tensor.name, tensor.type)) for tensor in plan]
    return [_weighted(checkpoint, tensor, hidden) for tensor in plan]


def _weighted(checkpoint: Checkpoint, tensor: PlannedTensor, hidden: int) -> PlannedTensor:
    """The same tensor with the importance of its columns, where its type uses it.

    The output of a layer norm has mean square gain² + bias² in each column, whatever the picture; the resampler's
    keys are made from that plus positions. Without pictures nothing is known of other inputs: all their columns count
    alike.
    """
    if tensor.type not in recipes.SEARCHED:
        return tensor
    norm = names.norm_before(tensor.name)

    def importance() -> npt.NDArray[np.float32]:
        squares = np.ones(tensor.n_columns, np.float32)
        if norm is not None:
            gain, bias = (checkpoint.float_rows(f"{norm}.{part}", 0, tensor.n_columns) for part in ("weight", "bias"))
            squares = (np.square(gain) + np.square(bias)).reshape(-1)
        if tensor.name == "resampler.attn.k.weight":
            table = pos2d_table(hidden, POSITIONS_SIDE, POSITIONS_SIDE)
            squares += np.einsum("pe,pe->e", table, table) / len(table)
        # No column may cost nothing: a block of such columns would lose its values altogether.
        return np.maximum(squares, MIN_IMPORTANCE * squares.mean() or 1.0)

    return dataclasses.replace(tensor, importance=importance)


def _plan_rearranged(checkpoint: Checkpoint, hidden: int, vision: recipes.VisionType) -> list[PlannedTensor]:
    """The resampler tensors that are cut, transposed or computed rather than copied."""
    plan = []
    in_weight, in_bias = names.RESAMPLER_IN_PROJ
    _expect(checkpoint, in_weight, (3 * hidden, hidden))
    _expect(checkpoint, in_bias, (3 * hidden,))
    for third, letter in enumerate("qkv"):

        def weight(start: int, stop: int, base: int = third * hidden) -> npt.NDArray[np.float32]:
            return checkpoint.float_rows(in_weight, base + start, base + stop)

        def bias(start: int, stop: int, base: int = third * hidden) -> npt.NDArray[np.float32]:
            return checkpoint.float_rows(in_bias, base, base + hidden).reshape(1, hidden)

        name = f"resampler.attn.{letter}"
        kind = recipes.vision_tensor_type(f"{name}.weight", (hidden, hidden), vision)
        plan.append(PlannedTensor(f"{name}.weight", (hidden, hidden), kind, weight))
        plan.append(PlannedTensor(f"{name}.bias", (hidden,), recipes.Q.F32, bias))
    source, name = names.RESAMPLER_PROJ
    _expect(checkpoint, source, (hidden, hidden))

    def transposed(start: int, stop: int) -> npt.NDArray[np.float32]:
        return checkpoint.float_rows(source, 0, hidden)[:, start:stop].T

    kind = recipes.vision_tensor_type(name, (hidden, hidden), vision)
    plan.append(PlannedTensor(name, (hidden, hidden), kind, transposed))

    def positions(start: int, stop: int) -> npt.NDArray[np.float32]:
        return pos2d_table(hidden, POSITIONS_SIDE, POSITIONS_SIDE)[start:stop]

    name, shape = names.RESAMPLER_POSITIONS, (POSITIONS_SIDE**2, hidden)
    plan.append(PlannedTensor(name, shape, recipes.vision_tensor_type(name, shape, vision), positions))
    return plan


def _expect(checkpoint: Checkpoint, name: str, shape: Shape) -> None:
    """Check a tensor of the checkpoint against the configuration."""
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        raise CheckpointError(
            f"The checkpoint lacks {name}; download the missing shards or use the merged checkpoint of a fine-tune."
        )
    if tensor.shape != shape:
        raise CheckpointError(
            f"{name} has shape {tensor.shape}, expected {shape} from config.json; the files belong to "
            "different models."
        )
