"""An initial sense of time: two queries that look at the earliest and at the latest frame of a group.

The resampler's values carry no time, and softmax cancels what all frames share; a query can only tell earlier from
later if its scores rise (or fall) with the temporal id over the whole range. The slow sines of the time embedding
can be summed to such a ramp, but with weights that an hour of training does not reach. So training starts with them:
one dimension of each head is the ramp, the content is removed from the block of inputs that the ramp reads (what the
values lose there is folded into the other inputs), and everything is trained from there.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from demo.model import Resampler
from demo.things import MAX_START
from edge_runtime.vision.sine_positions import sine

SLOPE = 1.5  # rise of the scores per temporal id (0.1 s)
QUERY_GAIN = 8.0  # the query's share of the slope; the rest is in the key weights
FIRST_QUERY, LAST_QUERY = 8, 9  # those that must know the track's ends, see `batches.HEADS`
BLOCK = slice(96, 128)  # inputs the ramp reads: slow sines, and one block of q8_0
TIMES = np.arange(0, MAX_START + 120, 4)


def ramp_weights(dim: int) -> Tensor:
    """Weights of the inputs in `BLOCK` whose sum over the time embedding rises evenly."""
    table = sine(dim, TIMES)[:, BLOCK].astype(np.float64)
    target = (TIMES - TIMES.mean()) * SLOPE * 128**0.5 / QUERY_GAIN
    centred = table - table.mean(axis=0)
    ridge = 1e-7 * np.trace(centred.T @ centred) * np.eye(table.shape[1])
    return torch.from_numpy(np.linalg.solve(centred.T @ centred + ridge, centred.T @ target)).float()


def has_ramp(resampler: Resampler) -> bool:
    """Whether the weights already contain a ramp."""
    return not resampler.ln_kv.weight[BLOCK].any()


def hold_ramp(resampler: Resampler) -> None:
    """Keep the content out of the block, before each step; even a thousandth of it would drown the time."""
    for parameter in (resampler.ln_kv.weight, resampler.ln_kv.bias):
        if parameter.grad is not None:
            parameter.grad[BLOCK] = 0.0


@torch.no_grad()
def add_ramp(resampler: Resampler) -> None:
    """Add the ramp to the weights, in place."""
    dim, heads = resampler.query.shape[1], resampler.heads
    _fold_block(resampler)
    weight, bias = resampler.attn.in_proj_weight, resampler.attn.in_proj_bias
    queries = resampler.ln_q(resampler.query)  # (16, dim)
    wanted = torch.zeros(len(queries))
    wanted[FIRST_QUERY], wanted[LAST_QUERY] = -QUERY_GAIN, QUERY_GAIN
    asks = torch.linalg.lstsq(queries, wanted[:, None], driver="gelsd").solution[:, 0]
    ramp = ramp_weights(dim)
    for head in range(heads):
        row = head * (dim // heads) + dim // heads - 1
        weight[row], bias[row] = asks, 0.0
        weight[dim + row] = 0.0
        weight[dim + row, BLOCK] = ramp
        bias[dim + row] = -ramp.sum()  # these inputs are cosines near 1 in the positions of still pictures


def _fold_block(resampler: Resampler) -> None:
    """Zero the content in `BLOCK` and let the value weights read it from the other inputs instead.

    The content is a layer norm of a product of lower rank, so the block is a linear function of the rest.
    """
    dim = resampler.query.shape[1]
    inside = torch.zeros(dim, dtype=torch.bool)
    inside[BLOCK] = True
    gain, shift = resampler.ln_kv.weight, resampler.ln_kv.bias
    centred = (resampler.kv_proj.weight - resampler.kv_proj.weight.mean(dim=0)).double()
    lift = (centred[inside] @ torch.linalg.pinv(centred[~inside], rtol=1e-5)).float()  # block = lift @ rest
    value = resampler.attn.in_proj_weight[2 * dim :]
    moved = value[:, inside] * gain[inside]
    rest_gain = gain[~inside].clamp(min=1e-3)
    resampler.attn.in_proj_bias[2 * dim :] += value[:, inside] @ shift[inside] - moved @ (
        lift @ (shift[~inside] / rest_gain)
    )
    value[:, ~inside] += (moved @ lift) / rest_gain
    value[:, inside] = 0.0
    gain[inside], shift[inside] = 0.0, 0.0
