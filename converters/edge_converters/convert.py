"""The whole conversion: one checkpoint folder enters, a decoder and an mmproj file leave, or an error and neither.

Section numbers refer to nothing outside: the keys are those of llama.cpp's qwen3 and clip architectures, plus the
`edge_runtime.*` keys documented in `edge_runtime.config`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

from edge_converters import recipes
from edge_converters import tensor_names as names
from edge_converters.checkpoint import Checkpoint
from edge_converters.quantize import quantize_gguf
from edge_converters.recipes import DECODER_TYPES, LOSSLESS, VISION_TYPES, DecoderType
from edge_converters.verify import verify_gguf
from edge_converters.vocabulary import read_vocabulary
from edge_converters.writer import PlannedTensor, copied, replacing, write_gguf
from edge_runtime import config as keys
from edge_runtime.errors import CheckpointError
from edge_runtime.resampler import pos2d_table

MINICPMV_VERSION = 6  # llama.cpp's number for the resampler of 4.0 and 4.5
POSITIONS_SIDE = 70  # side of the table llama.cpp expects in the file, whatever the model

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
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Converted:
    """Convert a MiniCPM-V 4.5 checkpoint into a decoder and an mmproj GGUF file.

    Parameters
    ----------
    source : folder with the checkpoint in the official layout.
    folder : where the files go; made if needed. They are named `ggml-model-<TYPE>.gguf` and `mmproj-model-<vtype>.gguf`.
    decoder_type : a key of `DECODER_TYPES`.
    vision_type : a key of `VISION_TYPES`.
    force : replace existing files.
    progress : called while working.

    Raises
    ------
    CheckpointError
        When the checkpoint cannot be converted or the files cannot be written. Nothing is left behind then.
    """
    if decoder_type not in DECODER_TYPES or vision_type not in VISION_TYPES:
        raise CheckpointError(
            f"The types {decoder_type!r} and {vision_type!r} were asked for; expected one of {', '.join(DECODER_TYPES)} for the decoder "
            f"and one of {', '.join(VISION_TYPES)} for the vision part."
        )
    checkpoint, recipe = Checkpoint(source), DECODER_TYPES[decoder_type]
    result = Converted(
        Path(folder) / f"ggml-model-{recipe.label}.gguf", Path(folder) / f"mmproj-model-{vision_type}.gguf"
    )
    _refuse_unknown_tensors(checkpoint)
    with contextlib.ExitStack() as stack:
        decoder, mmproj = (stack.enter_context(replacing(path, force)) for path in (result.decoder, result.mmproj))
        _write_mmproj(checkpoint, mmproj, VISION_TYPES[vision_type], result.mmproj.name, progress)
        _write_decoder(checkpoint, decoder, recipe, result.decoder.name, progress)
    return result


def _write_mmproj(checkpoint: Checkpoint, path: Path, kind: LlamaFileType, final_name: str, progress: Progress) -> None:
    tensors = _plan_vision(checkpoint, kind)
    _write(path, "clip", lambda writer: _vision_metadata(checkpoint, writer, kind), tensors, "vision", progress)
    verify_gguf(path, tensors, final_name, types_may_differ=False)


def _write_decoder(checkpoint: Checkpoint, path: Path, recipe: DecoderType, final_name: str, progress: Progress) -> None:
    if recipe.matrix is not None:
        _write_plain_decoder(checkpoint, path, recipe.matrix, recipe.file_type, progress)
        verify_gguf(path, _plan_decoder(checkpoint, recipe.matrix), final_name, types_may_differ=False)
        return
    matrix, file_type = LOSSLESS[checkpoint.tensors["llm.model.embed_tokens.weight"].dtype]
    lossless = path.with_name(path.name + "-lossless")
    try:
        _write_plain_decoder(checkpoint, lossless, matrix, file_type, progress)
        quantize_gguf(lossless, path, recipe.file_type, lambda n, total: progress("quantize", n, total))
    finally:
        lossless.unlink(missing_ok=True)
    verify_gguf(path, _plan_decoder(checkpoint, matrix), final_name, types_may_differ=True)


def _write_plain_decoder(
    checkpoint: Checkpoint, path: Path, matrix: Any, file_type: LlamaFileType, progress: Progress
) -> None:
    tensors = _plan_decoder(checkpoint, matrix)
    _write(path, "qwen3", lambda writer: _decoder_metadata(checkpoint, writer, file_type), tensors, "decoder", progress)


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


def _n_vision_layers(checkpoint: Checkpoint) -> int:
    n = int(checkpoint.number("vision_config", "num_hidden_layers"))
    # The configuration class defaults to true: an absent key drops the layer.
    return n - 1 if checkpoint.config.get("drop_vision_last_layer", True) else n


def _expect(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    """Hold a tensor of the checkpoint against the configuration."""
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"The checkpoint lacks {name}; download the missing shards or use the merged checkpoint of a fine-tune.")
    if tensor.shape != shape:
        raise CheckpointError(f"{name} has shape {tensor.shape}, expected {shape} from config.json; the files belong to different models.")


def _plan_decoder(checkpoint: Checkpoint, matrix: Any) -> list[PlannedTensor]:
    number = checkpoint.number
    hidden, vocabulary = int(number("hidden_size")), int(number("vocab_size"))
    n_heads, n_kv = int(number("num_attention_heads")), int(number("num_key_value_heads"))
    width, mlp = int(number("head_dim", default=hidden // n_heads)), int(number("intermediate_size"))
    shapes = {
        "token_embd": (vocabulary, hidden), "output": (vocabulary, hidden), "output_norm": (hidden,),
        "attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q_norm": (width,), "attn_k_norm": (width,),
        "attn_q": (n_heads * width, hidden), "attn_k": (n_kv * width, hidden), "attn_v": (n_kv * width, hidden),
        "attn_output": (hidden, n_heads * width),
        "ffn_gate": (mlp, hidden), "ffn_up": (mlp, hidden), "ffn_down": (hidden, mlp),
    }  # fmt: skip
    plan = []
    tied = bool(checkpoint.config.get("tie_word_embeddings")) and "llm.lm_head.weight" not in checkpoint.tensors
    for source, name in names.decoder_names(int(number("num_hidden_layers")), tied).items():
        _expect(checkpoint, source, shapes[name.split(".")[-2]])
        kind = recipes.decoder_tensor_type(checkpoint.tensors[source].shape, matrix)
        plan.append(copied(checkpoint, source, name, kind))
    return plan


def _plan_vision(checkpoint: Checkpoint, file_type: LlamaFileType) -> list[PlannedTensor]:
    number = checkpoint.number
    width, mlp = int(number("vision_config", "hidden_size")), int(number("vision_config", "intermediate_size"))
    patch, hidden = int(number("patch_size", default=14)), int(number("hidden_size"))
    side = int(number("vision_config", "image_size", default=980)) // patch
    square = {(part, n): shape for n in ("attn_q", "attn_k", "attn_v", "attn_out") for part, shape in (("weight", (width, width)), ("bias", (width,)))}  # fmt: skip
    shapes = square | {
        ("weight", "ffn_down"): (mlp, width), ("bias", "ffn_down"): (mlp,),
        ("weight", "ffn_up"): (width, mlp), ("bias", "ffn_up"): (width,),
        ("weight", "patch_embd"): (width, 3, patch, patch), ("bias", "patch_embd"): (width,),
        ("weight", "position_embd"): (side * side, width),
    }  # fmt: skip
    plan = []

    def add(source: str, name: str, shape: tuple[int, ...]) -> None:
        _expect(checkpoint, source, shape)
        plan.append(copied(checkpoint, source, name, recipes.vision_tensor_type(name, shape, file_type)))

    for source, name in names.vision_names(_n_vision_layers(checkpoint)).items():
        layer_part, part = name.rsplit(".", 2)[-2:]
        add(source, name, shapes.get((part, layer_part), (width,)))
    resampler_shapes = {
        "resampler.query": (int(number("query_num")), hidden),
        "resampler.kv.weight": (hidden, width),
        "resampler.attn.out.weight": (hidden, hidden),
    }
    for source, name in names.RESAMPLER.items():
        add(source, name, resampler_shapes.get(name, (hidden,)))
    return plan + _plan_computed_resampler(checkpoint, hidden, file_type)


def _plan_computed_resampler(checkpoint: Checkpoint, hidden: int, file_type: LlamaFileType) -> list[PlannedTensor]:
    """The resampler tensors that are cut, transposed or computed rather than copied."""
    plan = []
    in_weight, in_bias = names.RESAMPLER_IN_PROJ
    _expect(checkpoint, in_weight, (3 * hidden, hidden))
    _expect(checkpoint, in_bias, (3 * hidden,))
    for third, letter in enumerate("qkv"):

        def weight(start: int, stop: int, base: int = third * hidden) -> npt.NDArray[np.float32]:
            return checkpoint.float_rows(in_weight, base + start, base + stop)

        def bias(start: int, stop: int, base: int = third * hidden) -> npt.NDArray[np.float32]:
            return checkpoint.float_rows(in_bias, base, base + hidden).reshape(1, hidden)

        name = f"resampler.attn.{letter}"
        kind = recipes.vision_tensor_type(f"{name}.weight", (hidden, hidden), file_type)
        plan.append(PlannedTensor(f"{name}.weight", (hidden, hidden), kind, weight))
        plan.append(PlannedTensor(f"{name}.bias", (hidden,), recipes.Q.F32, bias))
    source, name = names.RESAMPLER_PROJ
    _expect(checkpoint, source, (hidden, hidden))

    def transposed(start: int, stop: int) -> npt.NDArray[np.float32]:
        return checkpoint.float_rows(source, 0, hidden)[:, start:stop].T

    kind = recipes.vision_tensor_type(name, (hidden, hidden), file_type)
    plan.append(PlannedTensor(name, (hidden, hidden), kind, transposed))

    def positions(start: int, stop: int) -> npt.NDArray[np.float32]:
        return pos2d_table(hidden, POSITIONS_SIDE, POSITIONS_SIDE)[start:stop]

    plan.append(PlannedTensor(names.RESAMPLER_POSITIONS, (POSITIONS_SIDE**2, hidden), recipes.Q.F32, positions))
    return plan


def _refuse_unknown_tensors(checkpoint: Checkpoint) -> None:
    """A tensor we would drop silently is a fine-tune's lost part: name it instead."""
    known = set(names.decoder_names(int(checkpoint.number("num_hidden_layers")), tied=False))
    known |= set(names.vision_names(int(checkpoint.number("vision_config", "num_hidden_layers"))))
    known |= {*names.RESAMPLER, *names.RESAMPLER_IN_PROJ, names.RESAMPLER_PROJ[0]}
    unknown = [n for n in checkpoint.tensors if n not in known and not n.endswith(names.IGNORED_SUFFIXES)]
    if unknown:
        raise CheckpointError(
            f"The checkpoint holds {len(unknown)} tensors that MiniCPM-V 4.5 does not have, such as {unknown[0]}; merge adapters into the weights first."
        )


def _name(checkpoint: Checkpoint) -> str:
    given = str(checkpoint.config.get("_name_or_path") or "").rstrip("/").rsplit("/", 1)[-1]
    return given or checkpoint.folder.resolve().name


def _decoder_metadata(checkpoint: Checkpoint, writer: GGUFWriter, file_type: LlamaFileType) -> None:
    number = checkpoint.number
    hidden, n_heads = int(number("hidden_size")), int(number("num_attention_heads"))
    head_dim = int(number("head_dim", default=hidden // n_heads))
    writer.add_type("model")
    writer.add_name(_name(checkpoint))
    writer.add_block_count(int(number("num_hidden_layers")))
    writer.add_context_length(int(number("max_position_embeddings")))
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(int(number("intermediate_size")))
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(int(number("num_key_value_heads")))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(float(number("rms_norm_eps")))
    writer.add_rope_freq_base(float(number("rope_theta")))
    writer.add_file_type(int(file_type))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    read_vocabulary(checkpoint, int(number("vocab_size"))).write(writer)


def _vision_metadata(checkpoint: Checkpoint, writer: GGUFWriter, file_type: LlamaFileType) -> None:
    number, preprocessor = checkpoint.number, checkpoint.preprocessor
    activation = checkpoint.config.get("vision_config", {}).get("hidden_act", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise CheckpointError(f"The vision tower uses {activation!r}; expected 'gelu_pytorch_tanh', as in MiniCPM-V 4.5.")
    slicing = checkpoint.config.get("slice_config") or {}
    resolution = preprocessor.get("scale_resolution", slicing.get("scale_resolution", keys.SCALE_RESOLUTION))
    max_slices = preprocessor.get("max_slice_nums", slicing.get("max_slice_nums", keys.MAX_SLICE_NUMS))
    writer.add_type("mmproj")
    writer.add_name(_name(checkpoint))
    writer.add_description("image encoder for MiniCPM-V")
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_minicpmv_projector", True)
    writer.add_file_type(int(file_type))
    writer.add_string("clip.projector_type", "resampler")
    writer.add_int32("clip.minicpmv_version", MINICPMV_VERSION)
    writer.add_uint32("clip.minicpmv_query_num", int(number("query_num")))
    writer.add_uint32("clip.vision.image_size", int(resolution))
    writer.add_uint32("clip.vision.patch_size", int(number("patch_size", default=14)))
    writer.add_uint32("clip.vision.embedding_length", int(number("vision_config", "hidden_size")))
    writer.add_uint32("clip.vision.feed_forward_length", int(number("vision_config", "intermediate_size")))
    writer.add_uint32("clip.vision.projection_dim", 0)
    writer.add_uint32("clip.vision.attention.head_count", int(number("vision_config", "num_attention_heads")))
    epsilon = float(number("vision_config", "layer_norm_eps", default=1e-6))
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", epsilon)
    writer.add_uint32("clip.vision.block_count", _n_vision_layers(checkpoint))
    writer.add_array("clip.vision.image_mean", [float(v) for v in preprocessor.get("norm_mean", keys.NORM)])
    writer.add_array("clip.vision.image_std", [float(v) for v in preprocessor.get("norm_std", keys.NORM)])
    writer.add_bool("clip.use_gelu", True)
    writer.add_uint32(keys.KEY_MAX_SLICE_NUMS, int(max_slices))
    writer.add_bool(keys.KEY_USE_IMAGE_ID, bool(preprocessor.get("use_image_id", True)))
