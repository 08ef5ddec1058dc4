"""Hugging Face checkpoint → GGUF: `convert` writes the decoder and the mmproj file that `edge_runtime` loads.

Reading order: `safetensors`, `nf4`, `awq`, `lora` and `checkpoint` (what enters), `vocabulary`, `tensor_names` (which
tensor becomes which), `recipes` and `overrides` (which type each gets), `plan` (all tensors of a file), `metadata`
(its keys), `quantize` (values → blocks), `writer` (blocks → file), `verify` and `report` (the file re-read),
`adapter`, `importance` and `calibrate` (what else can be made or taken), `convert` (the whole flow).
"""

from edge_converters.convert import ConversionOptions, convert_checkpoint
from edge_converters.plan.recipes import DECODER_TYPES, VISION_TYPES

__all__ = ["DECODER_TYPES", "VISION_TYPES", "ConversionOptions", "convert_checkpoint"]
