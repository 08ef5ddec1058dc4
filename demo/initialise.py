"""An untrained network whose first layers already see: the start of training from scratch.

The patch kernel is a whitened cosine transform, positions are smooth functions of row and column, and residual
branches start small. With random kernels the same network could not read at all after 11,000 pictures.
"""

from __future__ import annotations

import json
import math

import numpy as np
import torch
from torch import Tensor, nn

from demo.batches import SKELETON
from demo.model import DemoModel

LUMA_SHARE = 0.7  # of the kernel's rows; the rest is shared by two chroma directions
_CHANNELS = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]]) / np.sqrt([[3], [2], [6]])


def cosine_kernel(width: int, generator: torch.Generator) -> Tensor:
    """Patch kernel (width, 3, 14, 14): low-frequency cosines of luma and chroma, whitened and rotated at random."""
    n = np.arange(14)
    basis = np.cos(np.pi * (n[None] + 0.5) * n[:, None] / 14) * math.sqrt(2 / 14)
    basis[0] /= math.sqrt(2)
    order = sorted(((u, v) for u in range(14) for v in range(14)), key=lambda uv: uv[0] ** 2 + uv[1] ** 2)
    counts = [round(width * LUMA_SHARE), (width - round(width * LUMA_SHARE)) // 2]
    counts.append(width - sum(counts))
    rows = []
    for channel, count in zip(_CHANNELS, counts, strict=True):
        for u, v in order[:count]:
            # The spectrum of pictures falls with frequency; text needs high frequencies as strong as low ones.
            rows.append(np.multiply.outer(channel, np.outer(basis[u], basis[v])) * (0.1 + 0.1 * math.hypot(u, v)))
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return (rotation @ torch.from_numpy(np.array(rows)).float().flatten(1)).view(width, 3, 14, 14)


@torch.no_grad()
def new_model(seed: int = 0) -> DemoModel:
    """Make an untrained network of the configuration in `SKELETON`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = DemoModel(json.loads((SKELETON / "config.json").read_text("utf-8")))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, module.in_features**-0.5, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
    embeddings = model.vpm.embeddings
    embeddings.patch_embedding.weight.copy_(cosine_kernel(model.config["vision_config"]["hidden_size"], generator))
    embeddings.patch_embedding.bias.zero_()
    embeddings.position_embedding.weight.zero_()
    for part in (model.smooth.by_row, model.smooth.by_col):
        part.normal_(0, 0.15, generator=generator)
    model.llm.model.embed_tokens.weight.normal_(0, 0.5, generator=generator)
    dim = model.config["hidden_size"]
    model.resampler.attn.in_proj_weight.normal_(0, dim**-0.5, generator=generator)
    for layers, names in (
        (model.vpm.encoder.layers, ("self_attn.out_proj", "mlp.fc2")),
        (model.llm.model.layers, ("self_attn.o_proj", "mlp.down_proj")),
    ):
        for layer in layers:
            for name in names:
                layer.get_submodule(name).weight.mul_((2 * len(layers)) ** -0.5)
    return model
