"""The tower in eager PyTorch: linear layers in dynamic int8, or everything in bfloat16. Without the resampler."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from benchmarks.harness.child import require, serve, timed
from benchmarks.peers.tower import Affine, Float32, TowerFile, TowerSide


class TorchTower(TowerSide):
    """Options: mmproj, precision ("int8" or "bf16"), threads."""

    def __init__(self, options: dict[str, Any]) -> None:
        require("torch")
        super().__init__(options)

    def load(self) -> dict[str, Any]:
        """Build the tower from the file and convert it."""
        import torch

        torch.set_num_threads(self.options["threads"])
        self.file = TowerFile(self.options["mmproj"])
        _, load_s = timed(self._build)
        return {"load_s": load_s}

    def _build(self) -> None:
        import torch

        tower = _build(self.file).eval()
        if self.options["precision"] == "int8":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.ao warns that it will move
                tower = torch.ao.quantization.quantize_dynamic(tower, {torch.nn.Linear}, dtype=torch.qint8)
            self._dtype = torch.float32
        else:
            self._dtype = torch.bfloat16
            tower = tower.to(self._dtype)
        self._tower = tower

    def run(self, pixels: Float32) -> Float32:
        """Features of one slice."""
        import torch

        with torch.inference_mode():
            features: Float32 = self._tower(torch.from_numpy(pixels)[None].to(self._dtype)).float().numpy()[0]
        return features


def _build(file: TowerFile) -> Any:
    import torch
    from torch import nn
    from torch.nn import functional

    def linear(affine: Affine) -> nn.Linear:
        module = nn.Linear(affine.weight.shape[1], affine.weight.shape[0], device="meta")
        module.weight = nn.Parameter(torch.from_numpy(np.array(affine.weight)), requires_grad=False)
        module.bias = nn.Parameter(torch.from_numpy(np.array(affine.bias)), requires_grad=False)
        return module

    def norm(affine: Affine) -> nn.LayerNorm:
        module = nn.LayerNorm(len(affine.bias), eps=file.config.epsilon)
        module.weight = nn.Parameter(torch.from_numpy(np.array(affine.weight)), requires_grad=False)
        module.bias = nn.Parameter(torch.from_numpy(np.array(affine.bias)), requires_grad=False)
        return module

    heads = file.config.heads

    class Layer(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            layer = file.layer(n)
            self.norm1, self.norm2 = norm(layer.norm1), norm(layer.norm2)
            self.query, self.key, self.value = linear(layer.query), linear(layer.key), linear(layer.value)
            self.out, self.fc1, self.fc2 = linear(layer.out), linear(layer.fc1), linear(layer.fc2)

        def forward(self, x: Any) -> Any:
            h = self.norm1(x)
            q, k, v = (
                product(h).unflatten(-1, (heads, -1)).transpose(1, 2)
                for product in (self.query, self.key, self.value)
            )
            attended = functional.scaled_dot_product_attention(q, k, v, scale=file.scale)
            x = x + self.out(attended.transpose(1, 2).flatten(2))
            return x + self.fc2(functional.gelu(self.fc1(self.norm2(x)), approximate="tanh"))

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = linear(file.patches())
            self.positions = nn.Parameter(torch.from_numpy(file.positions()), requires_grad=False)
            self.layers = nn.ModuleList(Layer(n) for n in range(file.config.layers))
            self.post_norm = norm(file.affine("v.post_ln"))

        def forward(self, pixels: Any) -> Any:
            x = self.patches(pixels) + self.positions
            for layer in self.layers:
                x = layer(x)
            return self.post_norm(x)

    return Tower()


if __name__ == "__main__":
    serve(TorchTower)
