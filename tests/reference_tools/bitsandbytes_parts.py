"""Matrices quantised and read back by bitsandbytes; run by the reference environment.

    python bitsandbytes_parts.py PARTS.safetensors VALUES.npz

Writes the tensors that bitsandbytes stores, and the values it makes of them in float32.
"""

import sys

import bitsandbytes.functional as bnb
import numpy as np
import torch
from safetensors.torch import save_file

torch.manual_seed(0)
parts, values = {}, {}
for kind in ("nf4", "fp4"):
    for double in (True, False):
        for shape in ((256, 256), (768, 256), (48, 160)):
            name = f"llm.{kind}.{double}.{shape[0]}.{shape[1]}.weight"
            weight = torch.randn(shape) * 0.02
            packed, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=double, blocksize=64)
            parts[name] = packed
            for key, tensor in state.as_dict(packed=True).items():
                parts[f"{name}.{key}"] = tensor.clone()
            # Blocks run over the ends of rows, but the CPU's way back (0.50.2) starts anew in every row. One long row
            # has no such ends.
            state.shape = torch.Size((1, weight.numel()))
            flat = bnb.dequantize_4bit(packed, state).float().reshape(shape)
            assert (flat - weight).abs().max() < 0.3 * weight.abs().max(), "the quantiser is not undone"
            values[name] = flat.numpy()
save_file(parts, sys.argv[1])
np.savez(sys.argv[2], **values)
