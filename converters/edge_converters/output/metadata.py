"""config.json and the files beside it → the keys of both files, as llama.cpp's qwen3 and clip architectures need.

The `edge_runtime.*` keys are documented in `edge_runtime.weights.config`.
"""

from __future__ import annotations

from collections.abc import Callable

from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

from edge_converters.plan.recipes import VisionType
from edge_converters.plan.tensors import n_vision_layers
from edge_converters.sources.checkpoint import MAX_SIZE, MAX_VALUE, Checkpoint
from edge_runtime.errors import CheckpointError
from edge_runtime.vision.calibration import KEY_FLOAT_PRODUCTS, Calibration
from edge_runtime.weights import config as keys

MINICPMV_VERSION = 6  # llama.cpp's number for the resampler of 4.0 and 4.5


def model_name(checkpoint: Checkpoint) -> str:
    """Name that the checkpoint gives itself, or its folder's name."""
    given = str(checkpoint.config.get("_name_or_path") or "").rstrip("/").rsplit("/", 1)[-1]
    return given or checkpoint.folder.resolve().name


def decoder_metadata(checkpoint: Checkpoint, writer: GGUFWriter, file_type: LlamaFileType) -> None:
    """Add the keys of a decoder file, except the tokenizer's."""
    size, number = checkpoint.size, checkpoint.number
    hidden, n_heads = size("hidden_size"), size("num_attention_heads")
    head_dim = size("head_dim", default=hidden // n_heads)
    writer.add_type("model")
    writer.add_name(model_name(checkpoint))
    writer.add_block_count(size("num_hidden_layers"))
    writer.add_context_length(size("max_position_embeddings"))
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(size("intermediate_size"))
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(size("num_key_value_heads"))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(number("rms_norm_eps"))
    writer.add_rope_freq_base(number("rope_theta"))
    writer.add_file_type(int(file_type))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    if checkpoint.config.get(keys.KEY_TOY) is True:  # not in the official config.json, but in the demo's
        writer.add_bool(keys.KEY_TOY, True)


def vision_metadata(checkpoint: Checkpoint, vision: VisionType, writer: GGUFWriter) -> None:
    """Add the keys of an mmproj file."""
    size, number = checkpoint.size, checkpoint.number
    activation = checkpoint.config.get("vision_config", {}).get("hidden_act", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise CheckpointError(
            f"The vision tower uses {activation!r}; expected 'gelu_pytorch_tanh', as in MiniCPM-V 4.5."
        )
    writer.add_type("mmproj")
    writer.add_name(model_name(checkpoint))
    writer.add_description("image encoder for MiniCPM-V")
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_minicpmv_projector", True)
    writer.add_file_type(int(vision.file_type))
    # llama.cpp refuses unknown projectors at load; padded rows it would only notice in the middle of a picture.
    writer.add_string("clip.projector_type", keys.OWN_PROJECTOR if vision.ours_alone else keys.PROJECTOR)
    writer.add_int32("clip.minicpmv_version", MINICPMV_VERSION)
    writer.add_uint32("clip.minicpmv_query_num", size("query_num"))
    writer.add_uint32("clip.vision.image_size", _slicing(checkpoint, "scale_resolution", keys.SCALE_RESOLUTION))
    writer.add_uint32("clip.vision.patch_size", size("patch_size", default=14))
    writer.add_uint32("clip.vision.embedding_length", size("vision_config", "hidden_size"))
    writer.add_uint32("clip.vision.feed_forward_length", size("vision_config", "intermediate_size"))
    writer.add_uint32("clip.vision.projection_dim", 0)
    writer.add_uint32("clip.vision.attention.head_count", size("vision_config", "num_attention_heads"))
    epsilon = number("vision_config", "layer_norm_eps", default=1e-6)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", epsilon)
    writer.add_uint32("clip.vision.block_count", n_vision_layers(checkpoint))
    writer.add_array("clip.vision.image_mean", _norm(checkpoint, "norm_mean"))
    writer.add_array("clip.vision.image_std", _norm(checkpoint, "norm_std"))
    writer.add_bool("clip.use_gelu", True)
    writer.add_uint32(keys.KEY_MAX_SLICE_NUMS, _slicing(checkpoint, "max_slice_nums", keys.MAX_SLICE_NUMS))
    writer.add_bool(keys.KEY_USE_IMAGE_ID, bool(checkpoint.preprocessor.get("use_image_id", True)))


def calibrated_metadata(calibration: Calibration, plain: Callable[[GGUFWriter], None], writer: GGUFWriter) -> None:
    """Add the keys of an mmproj file, and those that calibration found."""
    plain(writer)
    if calibration.in_float:
        writer.add_array(KEY_FLOAT_PRODUCTS, sorted(calibration.in_float))


def _slicing(checkpoint: Checkpoint, name: str, default: int) -> int:
    """Setting from preprocessor_config.json, else from config.json's slice_config, else the official default."""
    value = settings = checkpoint.config.get("slice_config") or {}
    if isinstance(settings, dict):
        value = checkpoint.preprocessor.get(name, settings.get(name, default))
        if type(value) is int and 0 < value <= MAX_SIZE:
            return value
    raise CheckpointError(
        f"preprocessor_config.json or slice_config hold {value!r:.40} for {name}, expected a positive whole number; "
        "use the unmodified files."
    )


def _norm(checkpoint: Checkpoint, name: str) -> list[float]:
    """Mean or standard deviation of the three colours."""
    values = checkpoint.preprocessor.get(name, keys.NORM)
    if (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(type(value) in (int, float) and abs(value) < MAX_VALUE for value in values)
        and (name != "norm_std" or 0 not in values)
    ):
        return [float(value) for value in values]
    raise CheckpointError(
        f"preprocessor_config.json holds {values!r:.80} for {name}, expected three numbers; use the unmodified file."
    )
