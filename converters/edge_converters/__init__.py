"""Hugging Face checkpoint → GGUF: `convert` writes the decoder and the mmproj file that `edge_runtime` loads.

Reading order: `checkpoint` (what enters), `vocabulary`, `tensor_names` (which tensor becomes which), `recipes`
(which type each gets), `plan` (all tensors of a file), `quantize` (values → blocks), `writer` (blocks → file),
`verify` (the file re-read), `convert` (the whole flow).
"""

from edge_converters.convert import convert_checkpoint
from edge_converters.recipes import DECODER_TYPES, VISION_TYPES

__all__ = ["DECODER_TYPES", "VISION_TYPES", "convert_checkpoint"]
