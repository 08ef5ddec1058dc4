"""Files of the runtime → weights to continue training from: the converter in reverse.

A run need not start from scratch when the model in the package is at hand. What rounding lost is not restored, but a
few hundred steps recover it; afterwards the weights are float32 numbers like any others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_converters.plan import tensor_names as names
from edge_runtime.store.find import find_model
from edge_runtime.weights.gguf_file import GGUFFile


def unpack(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Read a decoder and an mmproj file.

    Parameters
    ----------
    folder : folder of both files.
    config : content of the network's config.json; gives the number of layers.

    Returns
    -------
    state : tensors in float32, by the checkpoint's names.

    Raises
    ------
    ModelFileError
        When a file is missing or damaged.
    """
    paths = find_model(folder)
    decoder, vision = GGUFFile(paths.decoder), GGUFFile(paths.mmproj)
    tied = bool(config.get("tie_word_embeddings"))
    state = {
        source: decoder.array(name) for source, name in names.decoder_names(config["num_hidden_layers"], tied).items()
    }
    tables = names.vision_names(config["vision_config"]["num_hidden_layers"]) | names.RESAMPLER
    state |= {source: vision.array(name) for source, name in tables.items()}
    for source, part in zip(names.RESAMPLER_IN_PROJ, ("weight", "bias"), strict=True):
        state[source] = np.concatenate([vision.array(f"resampler.attn.{letter}.{part}") for letter in "qkv"])
    source, name = names.RESAMPLER_PROJ
    state[source] = vision.array(name).T
    return {source: torch.from_numpy(np.array(values, np.float32)) for source, values in state.items()}
