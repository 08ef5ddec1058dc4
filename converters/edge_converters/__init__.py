"""Hugging Face checkpoint → GGUF: `convert` writes the decoder and the mmproj file that `edge_runtime` loads.

Reading order: `sources` (`safetensors`, `nf4`, `awq`, `lora`, `checkpoint`: the input), `plan` (`tensor_names`: which
tensor becomes which, `recipes` and `overrides`: its type, `tensors`: all tensors of a file, `encode_rows`: values →
blocks), `output` (`vocabulary`, `metadata`: the file's keys, `llama_quantize`, `gguf_writer`, `verify` and `report`:
the file re-read, `adapter`), `calibration` (importance and factors), `convert` (the whole flow).
"""

from edge_converters.convert import ConversionOptions, convert_checkpoint
from edge_converters.plan.recipes import DECODER_TYPES, VISION_TYPES

__all__ = ["DECODER_TYPES", "VISION_TYPES", "ConversionOptions", "convert_checkpoint"]
