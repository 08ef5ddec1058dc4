"""The whole conversion: one checkpoint folder enters, a decoder and an mmproj file leave, or an error and neither.

The keys are those of llama.cpp's qwen3 and clip architectures, plus the `edge_runtime.*` keys documented in
`edge_runtime.config`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType

from edge_converters.calibrate import calibrate, smoothing_tensors
from edge_converters.checkpoint import Checkpoint
from edge_converters.plan import n_vision_layers, plan_decoder, plan_vision, refuse_unknown_tensors
from edge_converters.quantize import quantize_gguf
from edge_converters.recipes import DECODER_TYPES, LOSSLESS, VISION_TYPES, VisionType
from edge_converters.verify import verify_gguf
from edge_converters.vocabulary import read_vocabulary
from edge_converters.writer import PlannedTensor, replacing, write_gguf
from edge_runtime import config as keys
from edge_runtime.calibration import KEY_FLOAT_PRODUCTS, Calibration
from edge_runtime.errors import CheckpointError

MINICPMV_VERSION = 6  # llama.cpp's number for the resampler of 4.0 and 4.5

Progress = Callable[[str, int, int], None]
"""(what is being done, units done, units in all)"""


@dataclass(frozen=True)
class Converted:
    """The two files written."""

    decoder: Path
    mmproj: Path


def convert_checkpoint(
    source: str | Path,
    folder: str | Path,
    *,
    decoder_type: str = "q4_k_m",
    vision_type: str = "q8_0",
    pictures: str | Path | None = None,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Converted:
    """Convert a MiniCPM-V 4.5 checkpoint into a decoder and an mmproj GGUF file.

    Parameters
    ----------
    source : folder with the checkpoint in the official layout.
    folder : where the files go; made if needed. They are named `ggml-model-<TYPE>.gguf` and
        `mmproj-model-<vtype>.gguf`.
    decoder_type : a key of `DECODER_TYPES`.
    vision_type : a key of `VISION_TYPES`.
    pictures : folder of pictures to calibrate the int8 path with; see `calibrate`. Seconds per slice.
    force : replace existing files.
    progress : called while working.

    Raises
    ------
    CheckpointError
        When the checkpoint cannot be converted or the files cannot be written. Nothing is left behind then.
    """
    if decoder_type not in DECODER_TYPES or vision_type not in VISION_TYPES:
        raise CheckpointError(
            f"The types {decoder_type!r} and {vision_type!r} were asked for; expected one of "
            f"{', '.join(DECODER_TYPES)} for the decoder "
            f"and one of {', '.join(VISION_TYPES)} for the vision part."
        )
    checkpoint, recipe, vision = Checkpoint(source), DECODER_TYPES[decoder_type], VISION_TYPES[vision_type]
    result = Converted(
        Path(folder) / f"ggml-model-{recipe.label}.gguf", Path(folder) / f"mmproj-model-{vision_type}.gguf"
    )
    # Everything is checked before a byte is written: the reasons to refuse should not come after minutes.
    refuse_unknown_tensors(checkpoint)
    matrix, file_type = (recipe.matrix, recipe.file_type) if recipe.matrix is not None else _lossless(checkpoint)
    vision_tensors, decoder_tensors = plan_vision(checkpoint, vision), plan_decoder(checkpoint, matrix)
    vocabulary = read_vocabulary(checkpoint, checkpoint.size("vocab_size"))

    def decoder_metadata(writer: GGUFWriter) -> None:
        _decoder_metadata(checkpoint, writer, file_type)
        vocabulary.write(writer)

    with contextlib.ExitStack() as stack:
        decoder, mmproj = (stack.enter_context(replacing(path, force)) for path in (result.decoder, result.mmproj))
        metadata: Callable[[GGUFWriter], None] = partial(_vision_metadata, checkpoint, vision)
        _write(mmproj, "clip", metadata, vision_tensors, "vision", progress)
        if pictures is not None:
            calibration = calibrate(mmproj, Path(pictures), progress)
            vision_tensors = [*vision_tensors, *smoothing_tensors(calibration)]
            metadata = partial(_calibrated_metadata, calibration, metadata)
            _write(mmproj, "clip", metadata, vision_tensors, "vision", progress)
        verify_gguf(mmproj, vision_tensors, result.mmproj.name, types_may_differ=False)
        if recipe.matrix is not None:
            _write(decoder, "qwen3", decoder_metadata, decoder_tensors, "decoder", progress)
        else:
            lossless = stack.enter_context(_scratch(decoder.with_name(decoder.name + "-lossless")))
            _write(lossless, "qwen3", decoder_metadata, decoder_tensors, "decoder", progress)
            quantize_gguf(lossless, decoder, recipe.file_type, lambda n, total: progress("quantize", n, total))
        verify_gguf(decoder, decoder_tensors, result.decoder.name, types_may_differ=recipe.matrix is None)
    return result


def _lossless(checkpoint: Checkpoint) -> tuple[GGMLQuantizationType, LlamaFileType]:
    """Type of the file that llama.cpp quantizes: the one the decoder's matrices are stored in, if it is one."""
    matrices = (t for n, t in checkpoint.tensors.items() if n.startswith("llm.") and len(t.shape) == 2)
    dtypes = {tensor.dtype for tensor in matrices}
    return LOSSLESS[dtypes.pop() if len(dtypes) == 1 else "F32"]


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A file that is gone when the block ends."""
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _write(
    path: Path,
    architecture: str,
    add_metadata: Callable[[GGUFWriter], None],
    tensors: list[PlannedTensor],
    what: str,
    progress: Progress,
) -> None:
    total, done = sum(tensor.n_bytes for tensor in tensors), 0

    def on_bytes(n: int) -> None:
        nonlocal done
        done += n
        progress(what, done, total)

    write_gguf(path, architecture, add_metadata, tensors, on_bytes)


def _name(checkpoint: Checkpoint) -> str:
    given = str(checkpoint.config.get("_name_or_path") or "").rstrip("/").rsplit("/", 1)[-1]
    return given or checkpoint.folder.resolve().name


def _decoder_metadata(checkpoint: Checkpoint, writer: GGUFWriter, file_type: LlamaFileType) -> None:
    size, number = checkpoint.size, checkpoint.number
    hidden, n_heads = size("hidden_size"), size("num_attention_heads")
    head_dim = size("head_dim", default=hidden // n_heads)
    writer.add_type("model")
    writer.add_name(_name(checkpoint))
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


def _vision_metadata(checkpoint: Checkpoint, vision: VisionType, writer: GGUFWriter) -> None:
    size, number = checkpoint.size, checkpoint.number
    activation = checkpoint.config.get("vision_config", {}).get("hidden_act", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise CheckpointError(
            f"The vision tower uses {activation!r}; expected 'gelu_pytorch_tanh', as in MiniCPM-V 4.5."
        )
    writer.add_type("mmproj")
    writer.add_name(_name(checkpoint))
    writer.add_description("image encoder for MiniCPM-V")
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_minicpmv_projector", True)
    writer.add_file_type(int(vision.file_type))
    # llama.cpp refuses a projector it does not know; of padded rows it would learn in the middle of a picture.
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


def _calibrated_metadata(calibration: Calibration, plain: Callable[[GGUFWriter], None], writer: GGUFWriter) -> None:
    plain(writer)
    if calibration.in_float:
        writer.add_array(KEY_FLOAT_PRODUCTS, sorted(calibration.in_float))


def _slicing(checkpoint: Checkpoint, name: str, default: int) -> int:
    """Setting of preprocessor_config.json, else of config.json's slice_config, else the official default."""
    value = settings = checkpoint.config.get("slice_config") or {}
    if isinstance(settings, dict):
        value = checkpoint.preprocessor.get(name, settings.get(name, default))
        if isinstance(value, int) and value > 0:
            return value
    raise CheckpointError(
        f"preprocessor_config.json or slice_config hold {value!r} for {name}, expected a positive whole number; use "
        "the unmodified files."
    )


def _norm(checkpoint: Checkpoint, name: str) -> list[float]:
    """Mean or standard deviation of the three colours."""
    values = checkpoint.preprocessor.get(name, keys.NORM)
    if (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(isinstance(value, int | float) for value in values)
    ):
        return [float(value) for value in values]
    raise CheckpointError(
        f"preprocessor_config.json holds {values!r} for {name}, expected three numbers; use the unmodified file."
    )
