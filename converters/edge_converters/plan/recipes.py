"""Which type each tensor gets, with the reason.

Vectors and norms stay float32 everywhere: they are a thousandth of the bytes and feed float32 arithmetic.
K-quant mixes are not decided here but by llama.cpp's own quantizer (`llama_quantize.quantize_gguf`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from edge_converters.plan.tensor_names import RESAMPLER_POSITIONS

Q = GGMLQuantizationType


@dataclass(frozen=True)
class DecoderType:
    """A `--type` of the converter."""

    label: str
    """The type in the file name."""
    file_type: LlamaFileType
    matrix: GGMLQuantizationType | None
    """Type of every matrix, or None when llama.cpp's quantizer chooses a mix."""
    wants_importance: bool = False
    """Whether so few bits should be spent by an importance matrix."""


DECODER_TYPES = {
    "f32": DecoderType("F32", LlamaFileType.ALL_F32, Q.F32),
    "f16": DecoderType("F16", LlamaFileType.MOSTLY_F16, Q.F16),
    "bf16": DecoderType("BF16", LlamaFileType.MOSTLY_BF16, Q.BF16),
    "q8_0": DecoderType("Q8_0", LlamaFileType.MOSTLY_Q8_0, Q.Q8_0),
    "q6_k": DecoderType("Q6_K", LlamaFileType.MOSTLY_Q6_K, None),
    "q5_k_m": DecoderType("Q5_K_M", LlamaFileType.MOSTLY_Q5_K_M, None),
    "q4_k_m": DecoderType("Q4_K_M", LlamaFileType.MOSTLY_Q4_K_M, None),
    "q4_k_s": DecoderType("Q4_K_S", LlamaFileType.MOSTLY_Q4_K_S, None),
    "q4_1": DecoderType("Q4_1", LlamaFileType.MOSTLY_Q4_1, None),
    "q4_0": DecoderType("Q4_0", LlamaFileType.MOSTLY_Q4_0, None),
    "iq4_nl": DecoderType("IQ4_NL", LlamaFileType.MOSTLY_IQ4_NL, None),
    "iq4_xs": DecoderType("IQ4_XS", LlamaFileType.MOSTLY_IQ4_XS, None),
    "q3_k_m": DecoderType("Q3_K_M", LlamaFileType.MOSTLY_Q3_K_M, None, wants_importance=True),
    "iq3_m": DecoderType("IQ3_M", LlamaFileType.MOSTLY_IQ3_M, None, wants_importance=True),
}
DEFAULT_DECODER, DEFAULT_VISION = "q4_k_m", "q8_0"
# AutoAWQ's groups are Q4_1 blocks almost to the bit (see `awq`); any other 4-bit type would round them again.
DEFAULT_DECODER_OF_AWQ = "q4_1"


@dataclass(frozen=True)
class VisionType:
    """A `--vision-type` of the converter."""

    file_type: LlamaFileType
    matrix: GGMLQuantizationType
    """Type of every matrix whose rows fit its blocks, except `SENSITIVE` ones."""
    ours_alone: bool = False
    """Rows that do not fit the blocks are padded; only this runtime can read such files."""


VISION_TYPES = {
    "f32": VisionType(LlamaFileType.ALL_F32, Q.F32),
    "f16": VisionType(LlamaFileType.MOSTLY_F16, Q.F16),
    "bf16": VisionType(LlamaFileType.MOSTLY_BF16, Q.BF16),
    "q8_0": VisionType(LlamaFileType.MOSTLY_Q8_0, Q.Q8_0),
    "q4_0": VisionType(LlamaFileType.MOSTLY_Q4_0, Q.Q4_0),
    "int4": VisionType(LlamaFileType.MOSTLY_Q4_0, Q.Q4_0, ours_alone=True),
}

# The path of the values through the resampler: four products in series, with no residual around them. Eight bits here
# cost 27 MB at full size and remove a quarter (trained weights) to two thirds (random ones) of the error.
SENSITIVE = frozenset(f"resampler.{name}.weight" for name in ("kv", "attn.v", "attn.out", "proj"))
NOT_SEARCHED = frozenset({Q.F32, Q.F16, Q.BF16, Q.Q8_0})  # types whose scales do not depend on importance
SEARCHED = frozenset(
    {Q.Q4_0}
)  # of the vision file: types that `encode_rows` writes and whose scales it can search for

# A tensor's dtype → its lossless type in the intermediate file that llama.cpp quantizes.
LOSSLESS = {"F32": Q.F32, "F16": Q.F16, "BF16": Q.BF16}

# Types that single tensors can be set to. llama.cpp quantizes to these without an importance matrix; the vision part
# has integer products for two of them.
DECODER_OVERRIDES = {
    kind.name.lower(): kind
    for kind in (
        *(Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q6_K, Q.Q5_K, Q.Q5_1, Q.Q5_0, Q.Q4_K, Q.Q4_1, Q.Q4_0),
        *(Q.IQ4_NL, Q.IQ4_XS, Q.IQ3_S, Q.Q3_K, Q.Q2_K),
    )
}
VISION_OVERRIDES = {kind.name.lower(): kind for kind in (Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0)}


def decoder_tensor_type(shape: tuple[int, ...], matrix: GGMLQuantizationType) -> GGMLQuantizationType:
    """Type of one decoder tensor: vectors float32, matrices as asked, F16 where rows do not fit the blocks."""
    if len(shape) < 2:
        return Q.F32
    return matrix if shape[-1] % GGML_QUANT_SIZES[matrix][0] == 0 else Q.F16


def vision_tensor_type(name: str, shape: tuple[int, ...], vision: VisionType) -> GGMLQuantizationType:
    """Type of one mmproj tensor, as llama.cpp's MiniCPM-V script has it for f32 and f16.

    One departure: in an f32 file the patch kernel is float32 too. The script always rounds it to float16, which
    shows in the fourth digit when the source is float32; llama.cpp loads both.
    """
    if name == RESAMPLER_POSITIONS and vision.matrix != Q.F16:
        # llama.cpp requires it in the file but never reads it: 80 MB as float32 at full size, 21 MB in blocks.
        return vision.matrix
    if vision.matrix == Q.F32 or not name.endswith(".weight") or len(shape) < 2:
        return Q.F32
    if name in ("v.patch_embd.weight", "v.position_embd.weight"):
        # A convolution kernel of 14-pixel rows and a lookup table: no block products to speed up. llama.cpp has no
        # convolution in bfloat16, whose range float16 lacks.
        if vision.matrix != Q.BF16:
            return Q.F16
        return Q.F32 if name == "v.patch_embd.weight" else Q.BF16
    matrix = Q.Q8_0 if vision.matrix == Q.Q4_0 and name in SENSITIVE else vision.matrix
    # fc2 of SigLIP has rows of 4304 = 134.5 blocks of 32: llama.cpp can read it as float16.
    fits = shape[-1] % GGML_QUANT_SIZES[matrix][0] == 0
    return matrix if fits or vision.ours_alone else Q.F16


Progress = Callable[[str, int, int], None]
"""(name of the step, units done, units in all)"""
