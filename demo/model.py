"""The network of MiniCPM-V 4.5 in torch, for training: its state dict has the official tensor names.

Patches and token ids enter, visual tokens and logits leave. Position buckets, position and time tables are those of
`edge_runtime`; a test checks that both compute the same.
"""

from __future__ import annotations

import json
import math
import shutil
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from demo.unpack import unpack
from edge_runtime.vision.resampler import pos2d_table
from edge_runtime.vision.sine_positions import sine
from edge_runtime.vision.tower import position_ids

POSITION_SIDE = 70
COPIED = ("config.json", "preprocessor_config.json", "tokenizer.json")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * D) → (B, heads, T, D)."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


class SelfAttention(nn.Module):
    """Attention of the vision tower: all patches of a slice attend to each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Of x, (N, P, width)."""
        q, k, v = (split_heads(part(x), self.heads) for part in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionLayer(nn.Module):
    """Pre-norm layer of SigLIP."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = SelfAttention(width, config.num_attention_heads)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(width, config.intermediate_size)
        self.mlp.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, x: Tensor) -> Tensor:
        """Of x, (N, P, width)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.layer_norm2(x)), approximate="tanh"))


class Vision(nn.Module):
    """Patches → patch features."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, width, 14, 14)
        self.embeddings.position_embedding = nn.Embedding(POSITION_SIDE**2, width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(width, 1e-6)

    def forward(self, patches: Tensor, tgt_size: tuple[int, int], table: Tensor) -> Tensor:
        """Encode slices of one grid.

        Parameters
        ----------
        patches : (N, P, 588) uint8.
        table : (4900, width), the position table as used in training.
        """
        kernel = self.embeddings.patch_embedding
        pixels = (patches.to(kernel.weight.dtype) / 255 - 0.5) / 0.5
        ids = torch.from_numpy(position_ids(*tgt_size, POSITION_SIDE)).to(patches.device)
        x = F.linear(pixels, kernel.weight.flatten(1), kernel.bias) + table[ids]
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


@lru_cache(maxsize=256)
def _positions(dim: int, rows: int, cols: int) -> Tensor:
    return torch.from_numpy(pos2d_table(dim, rows, cols))


class Attention(nn.Module):
    """Parameters of the resampler's attention, in the layout of torch.nn.MultiheadAttention."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)


class Resampler(nn.Module):
    """Patch features of a slice, or of packed frames → visual tokens."""

    def __init__(self, dim: int, width: int, queries: int) -> None:
        super().__init__()
        self.heads = dim // 128
        self.query = nn.Parameter(torch.randn(queries, dim) * 0.5)
        self.kv_proj = nn.Linear(width, dim, bias=False)
        self.attn = Attention(dim)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(dim, 1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.randn(dim, dim) * 0.5 * dim**-0.5)

    def forward(self, features: Tensor, tgt_size: tuple[int, int], times: Tensor | None = None) -> Tensor:
        """Resample groups.

        Parameters
        ----------
        features : (G, frames, P, width).
        times : (G, frames) temporal ids; None for still pictures.
        """
        dim = self.query.shape[1]
        values = self.ln_kv(self.kv_proj(features))  # (G, frames, P, dim)
        positions = _positions(dim, *tgt_size).to(features.device)
        if times is not None:
            table = torch.from_numpy(sine(dim, times.flatten().cpu().numpy())).to(features.device)
            positions = positions + table.view(*times.shape, 1, dim)
        wq, wk, wv = self.attn.in_proj_weight.chunk(3)
        bq, bk, bv = self.attn.in_proj_bias.chunk(3)
        q = F.linear(self.ln_q(self.query), wq, bq).expand(len(features), -1, -1)
        k, v = F.linear(values + positions, wk, bk), F.linear(values, wv, bv)
        q, k, v = (split_heads(part, self.heads) for part in (q, k.flatten(1, 2), v.flatten(1, 2)))
        out = self.attn.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.ln_post(out) @ self.proj


@lru_cache(maxsize=8)
def _rotation(length: int, width: int, theta: float) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(length).float(), theta ** (-torch.arange(0, width, 2).float() / width))
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions in the half-split form; x : (B, heads, T, D)."""
    cos, sin = _rotation(512, x.shape[3], theta)
    cos, sin = (part[: x.shape[2]].to(x) for part in (cos, sin))
    first, second = x.chunk(2, dim=3)
    return x * cos + torch.cat([-second, first], dim=3) * sin


class DecoderLayer(nn.Module):
    """Layer of Qwen3."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, width, mlp, eps = config.hidden_size, config.head_dim, config.intermediate_size, config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.theta = config.rope_theta
        self.self_attn = attn = nn.Module()
        attn.q_proj = nn.Linear(dim, self.heads * width, bias=False)
        attn.k_proj = nn.Linear(dim, self.kv_heads * width, bias=False)
        attn.v_proj = nn.Linear(dim, self.kv_heads * width, bias=False)
        attn.o_proj = nn.Linear(self.heads * width, dim, bias=False)
        attn.q_norm, attn.k_norm = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.mlp = nn.Module()
        self.mlp.gate_proj, self.mlp.up_proj = nn.Linear(dim, mlp, bias=False), nn.Linear(dim, mlp, bias=False)
        self.mlp.down_proj = nn.Linear(mlp, dim, bias=False)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)

    def forward(self, x: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Of x, (B, T, dim). With `wanted`, (B, T) bool, only these positions are returned, as (n, dim)."""
        attn, h = self.self_attn, self.input_layernorm(x)
        q = rotate(attn.q_norm(split_heads(attn.q_proj(h), self.heads)), self.theta)
        k = rotate(attn.k_norm(split_heads(attn.k_proj(h), self.kv_heads)), self.theta)
        v = split_heads(attn.v_proj(h), self.kv_heads)
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h.transpose(1, 2).flatten(2)
        x = x + attn.o_proj(h) if wanted is None else x[wanted] + attn.o_proj(h[wanted])
        h = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(h)) * self.mlp.up_proj(h))


class Decoder(nn.Module):
    """Embeddings → logits."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor, wanted: Tensor) -> Tensor:
        """Of x, (B, T, dim); `wanted`, (B, T) bool, are the positions whose logits are needed."""
        *layers, last = self.model.layers
        for layer in layers:
            x = layer(x)
        return self.lm_head(self.model.norm(last(x, wanted)))


class SmoothTable(nn.Module):
    """A smooth function of row and column, added to the position table in training.

    A picture uses few of the 70 x 70 entries; what it teaches them must hold for their neighbours, too.
    """

    def __init__(self, width: int, harmonics: int = 16) -> None:
        super().__init__()
        x = torch.arange(POSITION_SIDE) / POSITION_SIDE
        waves = torch.outer(x, torch.arange(1, harmonics + 1)) * math.pi
        self.register_buffer("basis", torch.cat([x[:, None] * 0 + 1, waves.sin(), waves.cos()], dim=1))
        self.by_row = nn.Parameter(torch.zeros(2 * harmonics + 1, width))
        self.by_col = nn.Parameter(torch.zeros(2 * harmonics + 1, width))

    def forward(self) -> Tensor:
        """(4900, width)."""
        return ((self.basis @ self.by_row)[:, None] + (self.basis @ self.by_col)[None]).flatten(0, 1)


class DemoModel(nn.Module):
    """The whole network; `config` is the content of config.json."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        settings, vision = SimpleNamespace(**config), SimpleNamespace(**config["vision_config"])
        self.config = config
        self.vpm = Vision(vision)
        self.resampler = Resampler(settings.hidden_size, vision.hidden_size, settings.query_num)
        self.llm = Decoder(settings)
        self.smooth = SmoothTable(vision.hidden_size)

    def position_table(self) -> Tensor:
        """Position table as used and saved."""
        return self.vpm.embeddings.position_embedding.weight + self.smooth()

    def features(self, patches: Tensor, tgt_size: tuple[int, int]) -> Tensor:
        """Patch features of slices of one grid: (B, n, P, 588) uint8 → (B, n, P, width)."""
        return self.vpm(patches.flatten(0, 1), tgt_size, self.position_table()).unflatten(0, patches.shape[:2])

    def visual_tokens(self, features: Tensor, tgt_size: tuple[int, int], times: Tensor | None = None) -> Tensor:
        """(B, n, P, width) → (B, n, queries, dim); with times n frames are one group: (B, 1, queries, dim)."""
        if times is not None:
            return self.resampler(features, tgt_size, times)[:, None]
        return self.resampler(features.flatten(0, 1)[:, None], tgt_size).unflatten(0, features.shape[:2])

    def logits(self, ids: Tensor, tokens: Tensor | None, holes: Tensor, wanted: Tensor) -> Tensor:
        """Logits at the wanted positions; tokens (B, slices * queries, dim) go where `holes` says."""
        x = self.llm.model.embed_tokens(ids)
        if tokens is not None:
            x = x.index_copy(1, holes, tokens)
        return self.llm(x, wanted)


def load_model(folder: Path, source: Path) -> DemoModel:
    """Read a checkpoint in the official layout, or the runtime's files of the configuration in `source`."""
    stored = folder / "model.safetensors"
    config = json.loads(((folder if stored.exists() else source) / "config.json").read_text("utf-8"))
    model = DemoModel(config)
    state = load_file(stored) if stored.exists() else unpack(folder, config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [name for name in missing if not name.startswith("smooth.")] + unexpected
    if wrong:
        raise ValueError(f"{folder} does not hold this network: {wrong[:3]}")
    return model


def save_model(model: DemoModel, folder: Path, source: Path) -> None:
    """Write a checkpoint in the official layout, with the configuration and tokenizer of `source`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if not k.startswith("smooth.")}
    state["vpm.embeddings.position_embedding.weight"] = model.position_table().detach().cpu()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for name in COPIED:
        if folder.resolve() != source.resolve():
            shutil.copyfile(source / name, folder / name)
