"""Every number of a model, read from its GGUF metadata and checked.

Sizes of MiniCPM-V 4.5 are written nowhere else.

Our own keys in the mmproj file, which other programs ignore (files without them get the defaults):

    edge_runtime.max_slice_nums   uint32   maximum number of cells that a picture is cut into (9)
    edge_runtime.use_image_id     bool     whether `<image_id>I</image_id>` precedes each picture (true)

    edge_runtime.row_length.TENSOR   uint32   see `weights`; a file that has it may name its projector
    `edge_runtime.vision.resampler` instead of `resampler`, so that other programs refuse it

and in the decoder file:

    edge_runtime.tokenizer.normalizer   string   `nfc` (default) or `none`: what happens to text before it is
    tokenised
    edge_runtime.toy                    bool     whether the model is a toy, whose answers mean nothing beyond what it
    was trained for (false)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType

from edge_runtime.errors import JOIN_PARTS, ModelFileError, UnsupportedModelError
from edge_runtime.weights.gguf_file import GGUFFile

KEY_MAX_SLICE_NUMS = "edge_runtime.max_slice_nums"
KEY_USE_IMAGE_ID = "edge_runtime.use_image_id"
KEY_TOY = "edge_runtime.toy"

SCALE_RESOLUTION = 448  # pixels; the official default where a checkpoint names none
MAX_SLICE_NUMS = 9
NORM = (0.5, 0.5, 0.5)
RESAMPLER_HEAD_DIM = 128  # resampler heads = hidden / 128, in the official code too
RESAMPLER_EPSILON = 1e-6
PROJECTOR = "resampler"  # llama.cpp's name
OWN_PROJECTOR = "edge_runtime.resampler"  # the same, in a file that llama.cpp could not compute with
MINICPMV_VERSION = 6  # llama.cpp's number of this resampler
LIMIT = 1 << 24  # above any real size; keeps products of two sizes harmless

# llama.cpp obeys every key of the architecture, and aborts the process on many unexpected values. So a decoder file
# may hold only these keys, and each of them is checked.
DECODER_SIZES = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
DECODER_KEYS = frozenset(
    f"qwen3.{name}"
    for name in (
        *DECODER_SIZES,
        "vocab_size",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.attn_factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
    )
)
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
MAX_LAYERS = 512  # llama.cpp's
NOT_FOR_WEIGHTS = frozenset({"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"})  # llama.cpp cannot multiply them
NORMAL_TOKEN = 1  # token type of GGUF


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
    """What the runtime must know about the decoder; llama.cpp reads the rest."""

    hidden: int
    vocabulary: int
    context_length: int
    """Positions the model was trained for."""


def is_toy(file: GGUFFile) -> bool:
    """Whether a decoder file says that its model is a toy."""
    return file.get(KEY_TOY, bool, False)


def _size(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = file.get(key, int) if default is None else file.get(key, int, default)
    if not 1 <= value <= LIMIT:
        raise ModelFileError(
            f"{file.path.name}: the key {key} is {value}, expected 1 to {LIMIT}; convert or download the file again."
        )
    return value


def _positive(file: GGUFFile, key: str, default: float) -> float:
    value = file.get(key, float, default)
    if not 0 < value < math.inf:
        raise ModelFileError(
            f"{file.path.name}: the key {key} is {value}, expected a positive number; convert or download the file "
            "again."
        )
    return value


def _triple(file: GGUFFile, key: str) -> tuple[float, float, float]:
    values = [float(v) for v in file.get(key, np.ndarray, np.asarray(NORM))]
    if len(values) != 3 or not all(math.isfinite(v) for v in values):
        raise ModelFileError(
            f"{file.path.name}: the key {key} holds {values[:4]}, expected three numbers; convert the file again."
        )
    return values[0], values[1], values[2]


def refuse_split(file: GGUFFile) -> None:
    """Refuse one part of a split model; all but the first hold only the keys of the split."""
    if file.get("split.count", int, 0) > 1:
        raise UnsupportedModelError(
            f"{file.path.name} is one part of a split model, expected a single file; {JOIN_PARTS}."
        )


def check_mmproj(file: GGUFFile) -> None:
    """Refuse a file that is not a MiniCPM-V 4.5 mmproj file."""
    refuse_split(file)
    architecture = file.get("general.architecture", str)
    if architecture != "clip":
        raise UnsupportedModelError(
            f"{file.path.name} has the architecture {architecture!r}, expected 'clip' (an mmproj file); "
            "name the decoder and the mmproj file of the same model."
        )
    projector = file.get("clip.projector_type", str, "")
    version = file.get("clip.minicpmv_version", int, 0)
    if projector not in (PROJECTOR, OWN_PROJECTOR) or version != MINICPMV_VERSION:
        raise UnsupportedModelError(
            f"{file.path.name} holds the projector {projector or 'unnamed'!r} of MiniCPM-V version {version}, "
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
    file.tensor("v.position_embd.weight", (rows, width))
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
        epsilon=_positive(file, "clip.vision.attention.layer_norm_epsilon", 1e-6),
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
    """Check what llama.cpp would not check in a decoder file, and read what the runtime needs."""
    refuse_split(file)
    architecture = file.get("general.architecture", str)
    if architecture != "qwen3":
        raise UnsupportedModelError(
            f"{file.path.name} has the architecture {architecture!r}, expected 'qwen3' (the decoder of MiniCPM-V "
            "4.5); use that model's file."
        )
    _check_decoder_keys(file)
    vocabulary, hidden = len(read_vocabulary(file).tokens), _size(file, "qwen3.embedding_length")
    file.tensor("token_embd.weight", (vocabulary, hidden))
    _check_decoder_types(file)
    return DecoderConfig(hidden, vocabulary, _size(file, "qwen3.context_length"))


def _check_decoder_keys(file: GGUFFile) -> None:
    unknown = sorted(key for key in file.metadata if key.startswith("qwen3.") and key not in DECODER_KEYS)
    if unknown:
        raise UnsupportedModelError(
            f"{file.path.name} has the setting {unknown[0][:80]!r}, which the decoder of MiniCPM-V 4.5 does not "
            "have; use that model's file."
        )
    hidden, heads = _size(file, "qwen3.embedding_length"), _size(file, "qwen3.attention.head_count")
    for name in DECODER_SIZES:
        _size(file, f"qwen3.{name}")
    kv_heads = _size(file, "qwen3.attention.head_count_kv", heads)
    if heads % kv_heads:
        raise ModelFileError(
            f"{file.path.name}: {kv_heads} key/value heads do not divide {heads} heads; convert the file again."
        )
    key_length = _size(file, "qwen3.attention.key_length", max(1, hidden // heads))
    lengths = {
        key_length,
        _size(file, "qwen3.attention.value_length", max(1, hidden // heads)),
        _size(file, "qwen3.rope.dimension_count", key_length),
    }
    if len(lengths) != 1 or key_length % 2:
        raise ModelFileError(
            f"{file.path.name}: key_length, value_length and rope.dimension_count are {sorted(lengths)}, expected "
            "one even number; convert the file again."
        )
    layers = _size(file, "qwen3.block_count")
    if layers > MAX_LAYERS:
        raise ModelFileError(
            f"{file.path.name}: qwen3.block_count is {layers}, at most {MAX_LAYERS} layers can be run; convert the "
            "file again."
        )
    for name, default in (("attention.layer_norm_rms_epsilon", 1e-6), ("rope.freq_base", 1e4)):
        _positive(file, f"qwen3.{name}", default)
    for name in ("factor", "attn_factor"):
        _positive(file, f"qwen3.rope.scaling.{name}", 1.0)
    scaling = file.get("qwen3.rope.scaling.type", str, "none")
    if scaling not in ROPE_SCALINGS:
        raise UnsupportedModelError(
            f"{file.path.name}: qwen3.rope.scaling.type is {scaling[:40]!r}, expected one of "
            f"{', '.join(ROPE_SCALINGS)}; convert the file again."
        )


def _check_decoder_types(file: GGUFFile) -> None:
    """Refuse tensors that llama.cpp maps without complaint and then cannot compute with."""
    for info in file.tensors.values():
        if info.type.name in NOT_FOR_WEIGHTS or (len(info.shape) == 1 and info.type != GGMLQuantizationType.F32):
            expected = "F32" if len(info.shape) == 1 else "F32, F16, BF16 or a quantised type"
            raise UnsupportedModelError(
                f"{file.path.name}: the tensor {info.name!r} is stored as {info.type.name}, expected {expected}; "
                "convert the file again."
            )
    file.rows("token_embd.weight", slice(0, 1))  # our own look-up must support its type too


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a decoder file."""

    tokens: list[str]
    """Distinct, none empty."""
    types: Sequence[int]
    """Token types of GGUF."""
    eos: int


def read_vocabulary(file: GGUFFile) -> Vocabulary:
    """Read the vocabulary of a decoder file.

    Raises
    ------
    ModelFileError
        When it is inconsistent; llama.cpp would abort the process on some of these.
    """
    tokens = file.strings("tokenizer.ggml.tokens")
    types = file.get("tokenizer.ggml.token_type", np.ndarray, np.full(len(tokens), NORMAL_TOKEN))
    if types.dtype.kind not in "iu" or len(types) != len(tokens):
        raise ModelFileError(
            f"{file.path.name} has {len(tokens)} tokens but {len(types)} token types (as {types.dtype}), expected "
            "one whole number for each; convert the model again."
        )
    seen: set[str] = set()
    for i, token in enumerate(tokens):
        if token in seen:
            raise ModelFileError(
                f"{file.path.name} has the token {token[:40]!r} more than once in its vocabulary, expected distinct "
                "tokens; convert the model again."
            )
        if not token or "\0" in token:  # llama.cpp reads tokens up to the first zero byte
            what = f"the token {token[:40]!r} with a zero byte" if token else "an empty token"
            raise ModelFileError(f"{file.path.name} has {what} (id {i}) in its vocabulary; convert the model again.")
        seen.add(token)
    eos = file.get("tokenizer.ggml.eos_token_id", int)
    if not 0 <= eos < len(tokens):
        raise ModelFileError(
            f"{file.path.name}: tokenizer.ggml.eos_token_id is {eos}, expected 0 to {len(tokens) - 1}; convert the "
            "model again."
        )
    return Vocabulary(tokens, types.tolist(), eos)
