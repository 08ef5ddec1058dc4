"""Every number of a model, read from its GGUF metadata and checked.

No constant of MiniCPM-V 4.5's size is typed elsewhere.

Keys of ours, in the mmproj file, which other programs ignore (defaults apply to files that lack them):

    edge_runtime.max_slice_nums   uint32   most cells a picture is cut into (9)
    edge_runtime.use_image_id     bool     whether `<image_id>I</image_id>` precedes each picture (true)

and in the decoder file:

    edge_runtime.tokenizer.normalizer   string   `nfc` (default) or `none`: what happens to text before it is
    tokenised
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_runtime.errors import ModelFileError, UnsupportedModelError
from edge_runtime.weights import GGUFFile

KEY_MAX_SLICE_NUMS = "edge_runtime.max_slice_nums"
KEY_USE_IMAGE_ID = "edge_runtime.use_image_id"

SCALE_RESOLUTION = 448  # pixels; the official default where a checkpoint names none
MAX_SLICE_NUMS = 9
NORM = (0.5, 0.5, 0.5)
RESAMPLER_HEAD_DIM = 128  # resampler heads = hidden / 128, in the official code too
RESAMPLER_EPSILON = 1e-6
MINICPMV_VERSION = 6  # llama.cpp's number of this resampler
LIMIT = 1 << 24  # above any real size; keeps products of two sizes harmless


@dataclass(frozen=True)
class SlicingConfig:
    """How a picture becomes slices."""

    scale_resolution: int
    """Side in pixels of the square whose area a slice aims at."""
    patch_size: int
    max_slice_nums: int
    use_image_id: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP tower."""

    width: int
    mlp: int
    heads: int
    layers: int
    epsilon: float
    position_side: int
    """Side of the square table of learned positions."""


@dataclass(frozen=True)
class ResamplerConfig:
    """The 3D resampler."""

    hidden: int
    """Width of the decoder, which is the width of the visual tokens."""
    queries: int
    """Visual tokens per slice, or per group of frames."""
    heads: int
    epsilon: float


@dataclass(frozen=True)
class DecoderConfig:
    """What the runtime must know of the decoder; the rest is llama.cpp's."""

    hidden: int
    vocabulary: int
    context_length: int
    """Positions the model was trained for."""


def _size(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = file.get(key, int) if default is None else file.get(key, int, default)
    if not 1 <= value <= LIMIT:
        raise ModelFileError(
            f"{file.path.name}: the key {key} is {value}, expected 1 to {LIMIT}; convert or download the file again."
        )
    return value


def _triple(file: GGUFFile, key: str) -> tuple[float, float, float]:
    values = [float(v) for v in file.metadata.get(key, NORM)]
    if len(values) != 3 or not all(math.isfinite(v) for v in values):
        raise ModelFileError(
            f"{file.path.name}: the key {key} holds {values[:4]}, expected three numbers; convert the file again."
        )
    return values[0], values[1], values[2]


def check_mmproj(file: GGUFFile) -> None:
    """Refuse a file that is no MiniCPM-V 4.5 mmproj."""
    architecture = file.get("general.architecture", str)
    if architecture != "clip":
        raise UnsupportedModelError(
            f"{file.path.name} has the architecture {architecture!r}, expected 'clip' (an mmproj file); "
            "name the decoder and the mmproj file of the same model."
        )
    projector = file.get("clip.projector_type", str, "")
    version = file.get("clip.minicpmv_version", int, 0)
    if projector != "resampler" or version != MINICPMV_VERSION:
        raise UnsupportedModelError(
            f"{file.path.name} holds the projector {projector or 'of no name'!r} of MiniCPM-V version {version}, "
            "expected 'resampler' version "
            f"{MINICPMV_VERSION} (MiniCPM-V 4.5); use the mmproj file of that model."
        )


def slicing_config(file: GGUFFile) -> SlicingConfig:
    """Read the slicing settings of an mmproj file."""
    std = _triple(file, "clip.vision.image_std")
    if 0.0 in std:
        raise ModelFileError(f"{file.path.name}: clip.vision.image_std holds a zero; convert the file again.")
    config = SlicingConfig(
        scale_resolution=_size(file, "clip.vision.image_size"),
        patch_size=_size(file, "clip.vision.patch_size"),
        max_slice_nums=_size(file, KEY_MAX_SLICE_NUMS, MAX_SLICE_NUMS),
        use_image_id=file.get(KEY_USE_IMAGE_ID, bool, True),
        mean=_triple(file, "clip.vision.image_mean"),
        std=std,
    )
    if config.scale_resolution > 8192 or config.patch_size > config.scale_resolution:
        raise ModelFileError(
            f"{file.path.name} asks for slices of {config.scale_resolution} pixels in patches of "
            f"{config.patch_size}; convert the file again."
        )
    return config


def vision_config(file: GGUFFile) -> VisionConfig:
    """Read the sizes of the vision tower of an mmproj file."""
    width, heads = (
        _size(file, "clip.vision.embedding_length"),
        _size(file, "clip.vision.attention.head_count"),
    )
    if width % heads:
        raise ModelFileError(
            f"{file.path.name}: {heads} heads do not divide the width {width}; convert the file again."
        )
    rows = file.tensor("v.position_embd.weight").n_rows
    if math.isqrt(rows) ** 2 != rows:
        raise ModelFileError(
            f"{file.path.name}: the table of positions has {rows} rows, expected a square number; convert the file "
            "again."
        )
    return VisionConfig(
        width=width,
        mlp=_size(file, "clip.vision.feed_forward_length"),
        heads=heads,
        layers=_size(file, "clip.vision.block_count"),
        epsilon=file.get("clip.vision.attention.layer_norm_epsilon", float, 1e-6),
        position_side=math.isqrt(rows),
    )


def resampler_config(file: GGUFFile) -> ResamplerConfig:
    """Read the sizes of the resampler of an mmproj file, from its query tensor."""
    queries, hidden = (
        file.tensor("resampler.query").shape[-2:] if len(file.tensor("resampler.query").shape) == 2 else (0, 0)
    )
    if not queries or hidden % RESAMPLER_HEAD_DIM:
        raise ModelFileError(
            f"{file.path.name}: resampler.query has shape {file.tensor('resampler.query').shape}, expected "
            f"(queries, a multiple of {RESAMPLER_HEAD_DIM}); convert the file again."
        )
    return ResamplerConfig(hidden, queries, hidden // RESAMPLER_HEAD_DIM, RESAMPLER_EPSILON)


def decoder_config(file: GGUFFile) -> DecoderConfig:
    """Check a decoder file as far as llama.cpp would not, and read what the runtime needs."""
    architecture = file.get("general.architecture", str)
    if architecture != "qwen3":
        raise UnsupportedModelError(
            f"{file.path.name} has the architecture {architecture!r}, expected 'qwen3' (the decoder of MiniCPM-V "
            "4.5); use that model's file."
        )
    hidden = _size(file, "qwen3.embedding_length")
    for key in ("block_count", "feed_forward_length", "attention.head_count"):
        _size(file, f"qwen3.{key}")
    vocabulary = len(file.strings("tokenizer.ggml.tokens"))
    file.tensor("token_embd.weight", (vocabulary, hidden))
    return DecoderConfig(hidden, vocabulary, _size(file, "qwen3.context_length"))
