"""The number types that a KV cache may use, and their size."""

from __future__ import annotations

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from edge_runtime.errors import MessageError
from edge_runtime.weights.gguf_file import GGUFFile

KV_TYPES = ("f16", "q8_0", "q4_0")


def choose_kv_type(file: GGUFFile, asked: str | None, *, exact: bool) -> str:
    """Type of the KV cache: the requested one, checked; by default float32 for exact arithmetic, otherwise float16.

    Raises
    ------
    MessageError
        When the type is unknown, or does not work with this model or with exact arithmetic.
    """
    default = "f32" if exact else "f16"
    chosen = asked or default
    if chosen not in (KV_TYPES if not exact else (default,)):
        expected = "'f32', which exact arithmetic needs" if exact else f"one of {', '.join(KV_TYPES)}"
        raise MessageError(f"The KV type is {chosen!r}; expected {expected}.")
    heads = file.get("qwen3.attention.head_count", int, 1)
    width = file.get("qwen3.attention.key_length", int, file.get("qwen3.embedding_length", int) // heads)
    block = GGML_QUANT_SIZES[GGMLQuantizationType[chosen.upper()]][0]
    if width % block:
        raise MessageError(
            f"The KV type is {chosen!r}, which stores blocks of {block} numbers, but heads of {file.path.name} have "
            f"{width}; expected f16 for this model."
        )
    return chosen


def low_kv_type(file: GGUFFile, *, exact: bool) -> str:
    """Type of the KV cache where memory is short and none was asked for: 8 bits, if heads and arithmetic allow it."""
    if exact:
        return choose_kv_type(file, None, exact=True)
    try:
        return choose_kv_type(file, "q8_0", exact=False)
    except MessageError:
        return choose_kv_type(file, None, exact=False)


def kv_bytes(kv_type: str, n: int) -> int:
    """Bytes of `n` numbers in a KV cache, in whole blocks."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kv_type.upper()]]
    return int(n // block * size)
