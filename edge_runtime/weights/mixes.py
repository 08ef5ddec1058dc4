"""The type that llama.cpp's quantizer gives each tensor of a decoder, for a file type by name.

Sizes of other quantisations of a file follow from its header alone; the quantizer itself would have to read the file.
Source: llama.cpp's src/llama-quant.cpp (`llama_tensor_get_type_impl`, `tensor_type_fallback`), for models without
experts and without an importance matrix, with which a few tensors of IQ4_XS, IQ4_NL and Q4_0 differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from edge_runtime.weights.gguf_file import GGUFFile, TensorInfo

Q = GGMLQuantizationType

MIXES = {
    "F16": Q.F16,
    "Q8_0": Q.Q8_0,
    "Q6_K": Q.Q6_K,
    "Q5_K_M": Q.Q5_K,
    "Q4_K_M": Q.Q4_K,
    "Q4_K_S": Q.Q4_K,
    "IQ4_NL": Q.IQ4_NL,
    "IQ4_XS": Q.IQ4_XS,
    "Q3_K_M": Q.Q3_K,
    "IQ3_M": Q.IQ3_S,
}
"""Type of most matrices, by name of the file type."""
GROUPED = 4
"""Query heads per key head from which the values' weights, which are small then, get more bits in some types."""

_FALLBACKS = {
    Q.IQ3_S: Q.IQ4_NL,
    Q.IQ4_XS: Q.IQ4_NL,
    Q.Q3_K: Q.Q4_0,
    Q.Q4_K: Q.Q5_0,
    Q.Q5_K: Q.Q5_1,
    Q.Q6_K: Q.Q8_0,
}
"""For rows that are no whole blocks of 256."""
_NAME = re.compile(r"^blk\.(\d+)\.(attn_v|ffn_down|attn_output)\.weight$")


@dataclass(frozen=True)
class Shape:
    """What of a decoder decides its tensors' types."""

    n_layers: int
    is_grouped: bool
    is_tied: bool
    """Whether the embedding table is the output matrix, too."""

    @classmethod
    def of(cls, file: GGUFFile) -> Shape:
        """That of a decoder file."""
        heads = file.get("qwen3.attention.head_count", int, 1)
        kv_heads = file.get("qwen3.attention.head_count_kv", int, heads)
        return cls(
            file.get("qwen3.block_count", int, 0),
            heads // max(1, kv_heads) >= GROUPED,
            "output.weight" not in file.tensors,
        )


def mixed_type(name: str, shape: tuple[int, ...], mix: str, decoder: Shape) -> GGMLQuantizationType:
    """Type of one tensor in a file of the type `mix`, a key of `MIXES`."""
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith("_norm.weight"):
        return Q.F32
    base = MIXES[mix]
    if base == Q.F16:
        return base
    chosen = base
    if name == "output.weight" or (name == "token_embd.weight" and decoder.is_tied):
        fits = shape[-1] % GGML_QUANT_SIZES[base][0] == 0
        chosen = Q.Q6_K if fits and base != Q.Q8_0 else Q.Q8_0
    elif (found := _NAME.match(name)) is not None:
        chosen = _better(found[2], int(found[1]), mix, decoder) or base
    if shape[-1] % GGML_QUANT_SIZES[chosen][0]:
        chosen = _FALLBACKS.get(chosen, chosen)
    return chosen if shape[-1] % GGML_QUANT_SIZES[chosen][0] == 0 else Q.F16


def _better(part: str, i: int, mix: str, decoder: Shape) -> GGMLQuantizationType | None:
    """Type of a matrix that counts more than others, in layer `i`; None where it gets no more bits than they."""
    n = decoder.n_layers
    at_ends_and_each_third = i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
    if mix in ("Q4_K_M", "Q5_K_M"):
        return Q.Q6_K if part != "attn_output" and at_ends_and_each_third else None
    if mix == "Q4_K_S":
        return Q.Q5_K if (part == "attn_v" and i < 4) or (part == "ffn_down" and i < n // 8) else None
    if mix in ("IQ4_XS", "IQ4_NL"):
        return Q.Q5_K if (part == "attn_v" and decoder.is_grouped) or (part == "ffn_down" and i < n // 8) else None
    if mix == "Q3_K_M":
        return Q.Q5_K if (part == "attn_v" and i < 2) or (part == "ffn_down" and i < n // 16) else Q.Q4_K
    if mix == "IQ3_M":
        return None if part == "ffn_down" and i >= n // 8 else Q.Q4_K
    return None


def mixed_bytes(file: GGUFFile, mix: str, without: Iterable[str] = ()) -> int:
    """Bytes that the tensors of a decoder file would take in another type.

    Parameters
    ----------
    without : names of tensors to leave out.
    """
    decoder, left_out = Shape.of(file), set(without)
    return sum(
        stored_bytes(info, mixed_type(info.name, info.shape, mix, decoder))
        for info in file.tensors.values()
        if info.name not in left_out
    )


def stored_bytes(info: TensorInfo, kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor's values in a type that its rows fit."""
    block, n_bytes = GGML_QUANT_SIZES[kind]
    return int(math.prod(info.shape) // block * n_bytes)
