"""Combine token ids and visual tokens into the stream of embeddings that the decoder takes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edge_runtime.decoder.decoder import Decoder
from edge_runtime.weights.gguf_file import Float32


def embed(decoder: Decoder, ids: npt.NDArray[np.int64], visual: Mapping[tuple[int, int], Float32]) -> Float32:
    """One stream of embeddings: token rows with visual tokens in place.

    Parameters
    ----------
    ids : ndarray [shape=(n,), int64]
    visual : (first, end) → ndarray [shape=(end - first, hidden), float32]; places may start before the first id and
        end after the last.

    Returns
    -------
    embeddings : ndarray [shape=(n, hidden), float32]
    """
    embeddings = np.array(decoder.embed(ids))
    for (first, end), tokens in visual.items():
        inside = slice(max(first, 0), min(end, len(ids)))
        embeddings[inside] = tokens[inside.start - first : inside.stop - first]
    return embeddings
