"""How much of this machine's memory a model will need, estimated from its files before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_runtime.decoder.kv_types import kv_bytes
from edge_runtime.decoder.options import CHUNK_TOKENS, DEFAULT_CONTEXT
from edge_runtime.decoder.prefill_routing import MAX_PAST_BYTES, uses_amx_prefill
from edge_runtime.errors import NotEnoughMemoryError
from edge_runtime.system.memory import available_bytes
from edge_runtime.vision.arithmetic import bytes_per_weight
from edge_runtime.vision.encoder import BATCH_PATCHES, ImageEncoder
from edge_runtime.weights.gguf_file import GGUFFile


@dataclass(frozen=True)
class Needs:
    """Bytes."""

    weights: int
    """Of the decoder. They are mapped, so pages may be dropped and read again, but every token reads all of them."""
    kv_cache: int
    compute: int
    """llama.cpp's buffers for one call."""
    vision: int
    """Weights repacked for the kernels, and the activations of one batch."""
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
    matrices = sum(info.n_elements for info in encoder.file.tensors.values() if len(info.shape) == 2)
    vision = encoder.tower.config
    activations = BATCH_PATCHES * 4 * (8 * vision.width + vision.mlp + 4 * encoder.hidden)
    return Needs(
        weights=decoder.path.stat().st_size * (2 if repack else 1),
        kv_cache=n_ctx * per_position,
        compute=CHUNK_TOKENS * 4 * (6 * width + 3 * mlp) + copied,
        vision=int(matrices * bytes_per_weight(exact=exact)) + activations,
        in_turns=low_memory and not repack,
    )


def choose_context(
    needs: Callable[[int], Needs], name: str, asked: int | None, longest: int, *, force: bool = False
) -> int:
    """Choose a context length that fits into memory.

    Parameters
    ----------
    needs : context length → needs.
    asked : what the user wants; None takes `DEFAULT_CONTEXT`, or half or a quarter of it when memory is short.
    longest : what the model was trained for.
    force : accept a context that does not fit.

    Raises
    ------
    NotEnoughMemoryError
        With the numbers.
    """
    free, smallest = available_bytes(), 0
    wanted = [asked] if asked else [DEFAULT_CONTEXT, DEFAULT_CONTEXT // 2, DEFAULT_CONTEXT // 4]
    for n_ctx in (min(n, longest) for n in wanted):
        if force or needs(n_ctx).total <= free:
            return n_ctx
        smallest = n_ctx
    raise NotEnoughMemoryError(_refusal(needs(smallest), name, smallest, free))


def _refusal(needs: Needs, name: str, n_ctx: int, free: int) -> str:
    return (
        f"{name} needs about {_gb(needs.total)} GB of memory (weights {_gb(needs.weights)}, KV cache for {n_ctx} "
        f"tokens {_gb(needs.kv_cache)}, vision {_gb(needs.vision)}, buffers {_gb(needs.compute)}), {_gb(free)} GB "
        "are free; close other programs, use a smaller --ctx, --kv-type q8_0, --low-memory or a smaller "
        "quantisation, or pass --force."
    )


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f}"
