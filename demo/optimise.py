"""Muon for the matrices of vision tower and resampler, AdamW for everything else.

Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from demo.model import DemoModel

MUON_RATE, ADAM_RATE = 2e-3, 1e-3
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(x: Tensor, steps: int = 4) -> Tensor:
    """Move the singular values of a stack of matrices (n, rows, cols) towards 1."""
    a, b, c = _NEWTON_SCHULZ
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum; `blocks` cuts a parameter into square blocks along its rows (q, k, v)."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.02) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        """Apply one step; matrices of the same shape are processed together."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])
                blocks = 3 if p.shape[0] == 3 * p.shape[1] else 1
                for part, change in zip(p.chunk(blocks), update.chunk(blocks), strict=True):
                    by_shape.setdefault(tuple(part.shape), []).append((part, change))
            for shape, pairs in by_shape.items():
                changes = orthogonalise(torch.stack([change for _, change in pairs]))
                for (part, _), change in zip(pairs, changes, strict=True):
                    part.mul_(1 - group["lr"] * group["decay"])
                    part.add_(change, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def make_optimisers(model: DemoModel, heads: nn.Module) -> list[torch.optim.Optimizer]:
    """Both optimisers, at their peak learning rates."""
    muon, adam = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() == 2 and name.startswith(("vpm.encoder.layers", "resampler."))
        (muon if matrix and not name.endswith(".query") else adam).append(parameter)
    groups = [{"params": adam, "lr": ADAM_RATE}, {"params": list(heads.parameters()), "lr": 8 * ADAM_RATE}]
    optimisers = [Muon(muon, MUON_RATE), torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return optimisers


def set_rate(optimisers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set all learning rates to a fraction of their peaks."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * factor
