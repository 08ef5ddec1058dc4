"""How much of this machine's memory a model will need, estimated from its files before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.decoder.kv_types import kv_bytes
from edge_runtime.decoder.options import CHUNK_TOKENS, LOW_MEMORY_UBATCH
from edge_runtime.decoder.prefill_routing import MAX_PAST_BYTES, uses_amx_prefill
from edge_runtime.vision.arithmetic import bytes_per_weight
from edge_runtime.vision.encoder import BATCH_PATCHES, LOW_MEMORY_PATCHES, ImageEncoder
from edge_runtime.weights.gguf_file import GGUFFile

EMBEDDINGS = "token_embd.weight"


@dataclass(frozen=True)
class Needs:
    """Bytes."""

    weights: int
    """Of the decoder. They are mapped, so pages may be dropped and read again, but every token reads all of them.

    Without an embedding table of its own, of which a prompt reads a few rows."""
    kv_cache: int
    compute: int
    """llama.cpp's buffers for one call."""
    vision: int
    """Weights repacked for the kernels, and the activations of one batch; in low memory, those of one layer."""
    in_turns: bool = False
    """Whether the two are in memory in turns: vision weights are dropped after use, and the decoder's are mapped."""

    @property
    def total(self) -> int:
        """Everything that is in memory at the same time."""
        largest = max(self.weights, self.vision) if self.in_turns else self.weights + self.vision
        return self.kv_cache + self.compute + largest


def estimate_memory(
    decoder: GGUFFile,
    encoder: ImageEncoder,
    n_ctx: int,
    *,
    exact: bool,
    kv_type: str | None = None,
    repack: bool = False,
    low_memory: bool = False,
) -> Needs:
    """Estimate the memory that a model needs; its files have passed their checks.

    Parameters
    ----------
    n_ctx : positions of the KV cache.
    kv_type : type of the cache's numbers; None takes the default of the arithmetic.
    repack : whether weights are copied when the decoder is loaded.
    low_memory : whether vision weights are dropped after pictures were encoded.
    """
    stored = kv_type or ("f32" if exact else "f16")

    def number(key: str, default: int = 0) -> int:
        return decoder.get(f"qwen3.{key}", int, default)

    heads = number("attention.head_count", 1)
    width = number("embedding_length")
    head = number("attention.key_length", width // heads), number("attention.value_length", width // heads)
    kv_heads = number("attention.head_count_kv", heads)
    per_position = number("block_count") * sum(kv_bytes(stored, kv_heads * n) for n in head)
    mlp = number("feed_forward_length")
    copies_past = not repack and uses_amx_prefill(decoder, stored, exact=exact)
    copied = min(n_ctx * per_position, MAX_PAST_BYTES) if copies_past else 0
    n_ubatch = LOW_MEMORY_UBATCH if low_memory else CHUNK_TOKENS
    return Needs(
        weights=(decoder.path.stat().st_size - unread_bytes(decoder)) * (2 if repack else 1),
        kv_cache=n_ctx * per_position,
        compute=n_ubatch * 4 * (6 * width + 3 * mlp) + copied,
        vision=_vision_bytes(encoder, exact=exact, low_memory=low_memory),
        in_turns=low_memory and not repack,
    )


def unread_bytes(decoder: GGUFFile) -> int:
    """Bytes of the embedding table, if it is not the output matrix, too: a prompt reads a few rows of it."""
    return decoder.tensors[EMBEDDINGS].n_bytes if "output.weight" in decoder.tensors else 0


def _vision_bytes(encoder: ImageEncoder, *, exact: bool, low_memory: bool) -> int:
    """Weights as the kernels read them, and what they compute with."""
    vision, packed = encoder.tower.config, bytes_per_weight(exact=exact)
    matrices = {name: info.n_elements for name, info in encoder.file.tensors.items() if len(info.shape) == 2}
    activations = BATCH_PATCHES * 4 * (8 * vision.width + vision.mlp + 4 * encoder.hidden)
    if not low_memory:
        return int(sum(matrices.values()) * packed) + activations
    # A layer and then the resampler, each with float32 weights that are being packed; and slices between layers.
    layer = sum(n for name, n in matrices.items() if name.startswith("v.blk.0."))
    resampler = sum(n for name, n in matrices.items() if name.startswith("resampler."))
    unpacked = max(2 * 4 * vision.width * vision.mlp, 2 * 4 * encoder.hidden**2)
    slices = LOW_MEMORY_PATCHES * 4 * vision.width
    return int(max(layer, resampler) * packed) + unpacked + slices + activations
