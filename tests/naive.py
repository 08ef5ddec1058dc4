"""The whole model by its definition, in plain NumPy and double precision: slow, obvious, and blind to GGUF.

Works on the tensors of a checkpoint under their official names. Shares no code with the project, so that a wrong
name, transposition or constant in converter or runtime cannot cancel out.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

Array = np.ndarray


def write_safetensors(path: Path, tensors: dict[str, Array]) -> None:
    """Write float32 tensors."""
    header, offset = {}, 0
    for name, value in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [offset, offset + 4 * value.size]}
        offset += 4 * value.size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(np.ascontiguousarray(value, "<f4").tobytes())


def random_tensors(config: dict, seed: int) -> dict[str, Array]:
    """Random weights for every tensor a configuration asks for."""
    rng = np.random.default_rng(seed)
    c, v = config, config["vision_config"]
    e, d, w = c["hidden_size"], c["head_dim"], v["hidden_size"]
    heads, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    patch = c["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "llm.model.embed_tokens.weight": (c["vocab_size"], e),
        "llm.lm_head.weight": (c["vocab_size"], e),
        "llm.model.norm.weight": (e,),
        "vpm.embeddings.patch_embedding.weight": (w, 3, patch, patch),
        "vpm.embeddings.patch_embedding.bias": (w,),
        "vpm.embeddings.position_embedding.weight": ((v["image_size"] // patch) ** 2, w),
        "vpm.post_layernorm.weight": (w,),
        "vpm.post_layernorm.bias": (w,),
        "resampler.query": (c["query_num"], e),
        "resampler.kv_proj.weight": (e, w),
        "resampler.attn.in_proj_weight": (3 * e, e),
        "resampler.attn.in_proj_bias": (3 * e,),
        "resampler.attn.out_proj.weight": (e, e),
        "resampler.attn.out_proj.bias": (e,),
        "resampler.proj": (e, e),
    }
    shapes |= {f"resampler.ln_{n}.{p}": (e,) for n in ("q", "kv", "post") for p in ("weight", "bias")}
    for n in range(c["num_hidden_layers"]):
        layer = f"llm.model.layers.{n}."
        shapes |= {layer + "self_attn.q_proj.weight": (heads, e), layer + "self_attn.o_proj.weight": (e, heads)}
        shapes |= {layer + f"self_attn.{x}_proj.weight": (kv, e) for x in "kv"}
        shapes |= {layer + f"self_attn.{x}_norm.weight": (d,) for x in "qk"}
        shapes |= {layer + f"{x}_layernorm.weight": (e,) for x in ("input", "post_attention")}
        shapes |= {layer + f"mlp.{x}_proj.weight": (c["intermediate_size"], e) for x in ("gate", "up")}
        shapes |= {layer + "mlp.down_proj.weight": (e, c["intermediate_size"])}
    for n in range(v["num_hidden_layers"]):
        layer, mlp = f"vpm.encoder.layers.{n}.", v["intermediate_size"]
        sizes = {f"self_attn.{x}_proj": (w, w) for x in ("q", "k", "v", "out")} | {
            "mlp.fc1": (mlp, w),
            "mlp.fc2": (w, mlp),
        }
        for name, shape in sizes.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        shapes |= {f"{layer}layer_norm{i}.{p}": (w,) for i in (1, 2) for p in ("weight", "bias")}
    tensors = {}
    for name, shape in shapes.items():
        is_gain = "norm" in name or ".ln_" in name
        spread = 0.1 if len(shape) == 1 else 1 / math.sqrt(shape[-1] if "proj" in name or "fc" in name else 8)
        value = rng.normal(0, spread, shape)
        tensors[name] = (value + 1 if is_gain and name.endswith("weight") else value).astype(np.float32)
    return tensors


class NaiveModel:
    """Tower, resampler and decoder of one checkpoint."""

    def __init__(self, config: dict, tensors: dict[str, Array]) -> None:
        self.config, self.w = config, {name: value.astype(np.float64) for name, value in tensors.items()}

    def vision(self, patches: Array, ids: Array) -> Array:
        """Features of one slice: patches [P, 3, p, p], position ids [P] → [P, width]."""
        w, vision = self.w, self.config["vision_config"]
        kernel = w["vpm.embeddings.patch_embedding.weight"]
        x = patches.reshape(len(patches), -1) @ kernel.reshape(len(kernel), -1).T
        x = x + w["vpm.embeddings.patch_embedding.bias"] + w["vpm.embeddings.position_embedding.weight"][ids]
        n_heads = vision["num_attention_heads"]
        for n in range(vision["num_hidden_layers"]):
            layer = f"vpm.encoder.layers.{n}."

            def linear(x: Array, name: str, layer: str = layer) -> Array:
                return x @ w[f"{layer}{name}.weight"].T + w[f"{layer}{name}.bias"]

            h = self.layer_norm(x, f"{layer}layer_norm1")
            q, k, v = (linear(h, f"self_attn.{part}_proj") for part in "qkv")
            x = x + linear(attention(q, k, v, n_heads), "self_attn.out_proj")
            h = linear(self.layer_norm(x, f"{layer}layer_norm2"), "mlp.fc1")
            h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            x = x + linear(h, "mlp.fc2")
        return self.layer_norm(x, "vpm.post_layernorm")

    def layer_norm(self, x: Array, name: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def resample(self, features: Array, rows: int, cols: int) -> Array:
        """Visual tokens of one still slice: [P, width] → [queries, hidden]."""
        w, e = self.w, self.config["hidden_size"]
        value = self.layer_norm(features @ w["resampler.kv_proj.weight"].T, "resampler.ln_kv")
        col, row = np.arange(rows * cols) % cols, np.arange(rows * cols) // cols
        key = value + np.concatenate([self.sine(col, e // 2), self.sine(row, e // 2)], axis=1)
        query = self.layer_norm(w["resampler.query"], "resampler.ln_q")
        weights, biases = (
            np.split(w["resampler.attn.in_proj_weight"], 3),
            np.split(w["resampler.attn.in_proj_bias"], 3),
        )
        q, k, v = (x @ m.T + b for x, m, b in zip((query, key, value), weights, biases, strict=True))
        out = attention(q, k, v, e // 128) @ w["resampler.attn.out_proj.weight"].T + w["resampler.attn.out_proj.bias"]
        return self.layer_norm(out, "resampler.ln_post") @ w["resampler.proj"]

    @staticmethod
    def sine(positions: Array, dim: int) -> Array:
        phase = positions[:, None] / 10000 ** (np.arange(dim // 2) / (dim / 2))
        return np.concatenate([np.sin(phase), np.cos(phase)], axis=1)

    def logits(self, embeddings: Array) -> Array:
        """Logits after the last of a prompt's embeddings [n, hidden] → [vocabulary]."""
        w, c = self.w, self.config
        n, d = len(embeddings), c["head_dim"]
        groups = c["num_attention_heads"] // c["num_key_value_heads"]
        phase = np.arange(n)[:, None] / c["rope_theta"] ** (np.arange(d // 2) / (d / 2))
        cos, sin = (np.concatenate([f(phase)] * 2, axis=1)[:, None] for f in (np.cos, np.sin))

        def rotated(x: Array, name: str) -> Array:
            x = self.rms_norm(x.reshape(n, -1, d), name)
            turned = np.concatenate([-x[..., d // 2 :], x[..., : d // 2]], axis=-1)
            return x * cos + turned * sin

        x = embeddings.astype(np.float64)
        for i in range(c["num_hidden_layers"]):
            layer = f"llm.model.layers.{i}."
            h = self.rms_norm(x, f"{layer}input_layernorm")
            q, k, v = (h @ w[f"{layer}self_attn.{part}_proj.weight"].T for part in "qkv")
            q, k = rotated(q, f"{layer}self_attn.q_norm"), rotated(k, f"{layer}self_attn.k_norm")
            k, v = np.repeat(k, groups, axis=1), np.repeat(v.reshape(n, -1, d), groups, axis=1)
            h = attention(q.reshape(n, -1), k.reshape(n, -1), v.reshape(n, -1), q.shape[1], causal=True)
            x = x + h @ w[f"{layer}self_attn.o_proj.weight"].T
            h = self.rms_norm(x, f"{layer}post_attention_layernorm")
            gate, up = (h @ w[f"{layer}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{layer}mlp.down_proj.weight"].T
        return self.rms_norm(x[-1], "llm.model.norm") @ w["llm.lm_head.weight"].T

    def rms_norm(self, x: Array, name: str) -> Array:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config["rms_norm_eps"]) * self.w[f"{name}.weight"]


def attention(q: Array, k: Array, v: Array, heads: int, *, causal: bool = False) -> Array:
    """Softmax attention over [n, heads * d] arrays."""
    d = q.shape[-1] // heads
    out = []
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        scores = q[:, part] @ k[:, part].T / math.sqrt(d)
        if causal:
            scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
    return np.concatenate(out, axis=1)
