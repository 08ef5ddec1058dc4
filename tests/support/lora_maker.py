"""LoRA adapters for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from edge_runtime.weights.gguf_file import GGUFFile

ALPHA, RANK = 6.0, 4


def make_adapter(path: Path, decoder: Path, seed: int, scale: float = 0.3) -> dict[str, np.ndarray]:
    """Write an adapter of some matrices of every layer; returns what it adds to them."""
    rng, file = np.random.default_rng(seed), GGUFFile(decoder)
    writer = GGUFWriter(path, "qwen3")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    added = {}
    for name, info in file.tensors.items():
        if not name.endswith(("attn_q.weight", "attn_v.weight", "ffn_down.weight", "attn_output.weight")):
            continue
        n_out, n_in = info.shape
        a = (rng.standard_normal((RANK, n_in)) / np.sqrt(n_in)).astype(np.float32)
        b = (rng.standard_normal((n_out, RANK)) * scale / np.sqrt(RANK)).astype(np.float32)
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
        added[name] = ALPHA / RANK * (b @ a)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return added
