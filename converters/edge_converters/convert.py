"""The whole conversion: a checkpoint folder enters; a decoder and an mmproj file leave, or an error and no file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypedDict, Unpack

from gguf import GGUFWriter

from edge_converters.calibration.importance import Importance, read_importance
from edge_converters.calibration.importance_from_pictures import observe
from edge_converters.calibration.smoothing import calibrate, smoothing_tensors
from edge_converters.output.adapter import adapter_metadata, plan_adapter
from edge_converters.output.gguf_writer import beside, replacing, storing, write_gguf
from edge_converters.output.llama_quantize import quantize_gguf
from edge_converters.output.metadata import calibrated_metadata, decoder_metadata, vision_metadata
from edge_converters.output.report import FileReport, report_file
from edge_converters.output.verify import verify_gguf
from edge_converters.output.vocabulary import Vocabulary, read_vocabulary
from edge_converters.plan import recipes
from edge_converters.plan.overrides import choose_types
from edge_converters.plan.planned_tensor import PlannedTensor
from edge_converters.plan.recipes import DECODER_TYPES, VISION_TYPES, DecoderType, Progress
from edge_converters.plan.tensors import Types, plan_decoder, plan_vision, refuse_unknown_tensors
from edge_converters.sources.checkpoint import Checkpoint
from edge_converters.sources.lora import Lora
from edge_runtime.errors import CheckpointError
from edge_runtime.store.find import ADAPTER_PREFIX


@dataclass(frozen=True)
class Converted:
    """The files written, and notes for the user."""

    decoder: Path
    mmproj: Path
    adapter: Path | None = None
    """The decoder's part of a LoRA, if requested."""
    reports: tuple[FileReport, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences for the user."""


@dataclass
class Plan:
    """Everything that is decided before a byte is written."""

    checkpoint: Checkpoint
    recipe: DecoderType
    vision: recipes.VisionType
    lora: Lora | None = None
    decoder_types: Types = field(default_factory=dict)
    vision_types: Types = field(default_factory=dict)
    importance: Importance | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # In this order: planning the tensors checks vocab_size against the rows that exist.
        self.tensors = plan_decoder(self.checkpoint, self.recipe, self.decoder_types)
        self.vocabulary: Vocabulary = read_vocabulary(self.checkpoint, self.checkpoint.size("vocab_size"))
        self.vision_tensors = plan_vision(self.checkpoint, self.vision, self.vision_types)
        self.adapter_tensors = [] if self.lora is None else plan_adapter(self.lora, self.checkpoint)


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Every option of `convert_checkpoint`, which takes them as keyword arguments.

    Parameters
    ----------
    decoder_type : a key of `DECODER_TYPES`. Default: q4_k_m, and q4_1 for AWQ checkpoints, whose integers it keeps.
    vision_type : a key of `VISION_TYPES`. Default: q8_0.
    lora : LoRA folder to merge into decoder and vision part.
    lora_adapter : LoRA folder whose decoder part becomes a separate file, `adapter-<NAME>.gguf`; its vision part is
        merged, since an adapter cannot hold it.
    pictures : folder of pictures to calibrate the int8 path with, see `calibrate`; seconds per slice. With the texts
        in it, they also make the importance matrix of the decoder's quantizer, see `observe`.
    imatrix : llama-imatrix's importance matrix for the decoder's quantizer, instead of one made here.
    tensor_types, vision_tensor_types : `PATTERN=TYPE` for tensors of the two files; see `choose_types`.
    report : measure what the types cost, tensor by tensor.
    force : replace existing files.
    progress : called with the name of the step, units done and units in all.
    """

    decoder_type: str | None = None
    vision_type: str = recipes.DEFAULT_VISION
    lora: str | Path | None = None
    lora_adapter: str | Path | None = None
    pictures: str | Path | None = None
    imatrix: str | Path | None = None
    tensor_types: Sequence[str] = ()
    vision_tensor_types: Sequence[str] = ()
    report: bool = False
    force: bool = False
    progress: Progress = lambda what, done, total: None


class ConversionKeywords(TypedDict, total=False):
    """Keyword arguments of `convert_checkpoint`, documented in `ConversionOptions`."""

    decoder_type: str | None
    vision_type: str
    lora: str | Path | None
    lora_adapter: str | Path | None
    pictures: str | Path | None
    imatrix: str | Path | None
    tensor_types: Sequence[str]
    vision_tensor_types: Sequence[str]
    report: bool
    force: bool
    progress: Progress


def convert_checkpoint(source: str | Path, folder: str | Path, **options: Unpack[ConversionKeywords]) -> Converted:
    """Convert a MiniCPM-V 4.5 checkpoint into a decoder and an mmproj GGUF file.

    Parameters
    ----------
    source : folder with the checkpoint in the official layout: bfloat16, float16 or float32, bitsandbytes' 4 bits, or
        AutoAWQ's.
    folder : where the files go; created if needed. They are named `ggml-model-<TYPE>.gguf` and
        `mmproj-model-<vtype>.gguf`.
    options : decoder_type, vision_type, lora, lora_adapter, pictures, imatrix, tensor_types, vision_tensor_types,
        report, force, progress; `help(edge_converters.ConversionOptions)` explains each.

    Raises
    ------
    CheckpointError
        When the checkpoint cannot be converted or the files cannot be written. Nothing is left behind.
    TypeError
        When an option is unknown.
    """
    unknown = sorted(options.keys() - ConversionOptions.__dataclass_fields__.keys())
    if unknown:
        raise TypeError(f"convert_checkpoint() got an unexpected keyword argument {unknown[0]!r}")
    asked = ConversionOptions(**options)
    plan = _plan(Checkpoint(source), asked)
    plan = _with_types(plan, asked.tensor_types, asked.vision_tensor_types)
    _weigh(plan)
    return _write_files(plan, Path(folder), asked)


def _write_files(plan: Plan, folder: Path, options: ConversionOptions) -> Converted:
    """Write all files under temporary names, and rename them when the last one is complete."""
    pictures, progress = options.pictures, options.progress
    result = Converted(
        folder / f"ggml-model-{plan.recipe.label}.gguf",
        folder / f"mmproj-model-{options.vision_type}.gguf",
        folder / f"{ADAPTER_PREFIX}{plan.lora.name}.gguf" if plan.lora else None,
    )
    paths = [path for path in (result.decoder, result.mmproj, result.adapter) if path is not None]
    with replacing(paths, force=options.force) as (decoder, mmproj, *adapters):
        _write_vision(plan, mmproj, result.mmproj, pictures, progress)
        _write_decoder(plan, decoder, result.decoder, progress, mmproj, pictures)
        for adapter in adapters:
            assert plan.lora is not None
            assert result.adapter is not None
            with storing(result.adapter):
                metadata = partial(adapter_metadata, plan.lora)
                _write(adapter, "qwen3", metadata, plan.adapter_tensors, "adapter", progress)
            verify_gguf(adapter, plan.adapter_tensors, result.adapter.name, types_may_differ=False)
        reports = []
        if options.report:
            files = ((decoder, plan.tensors, result.decoder), (mmproj, plan.vision_tensors, result.mmproj))
            reports = [report_file(path, tensors, final.name, progress) for path, tensors, final in files]
    return replace(result, reports=tuple(reports), notes=tuple(plan.notes))


def _plan(checkpoint: Checkpoint, options: ConversionOptions) -> Plan:
    """Check everything before a byte is written: nobody should wait minutes for a refusal."""
    decoder_type, vision_type = options.decoder_type or _suitable_type(checkpoint), options.vision_type
    if decoder_type not in DECODER_TYPES or vision_type not in VISION_TYPES:
        raise CheckpointError(
            f"The types {decoder_type!r} and {vision_type!r} were asked for; expected one of "
            f"{', '.join(DECODER_TYPES)} for the decoder "
            f"and one of {', '.join(VISION_TYPES)} for the vision part."
        )
    if options.lora is not None and options.lora_adapter is not None:
        raise CheckpointError("A LoRA can be merged or become an adapter, not both; give --lora or --lora-adapter.")
    refuse_unknown_tensors(checkpoint)
    beside, notes = None, []
    if options.lora is not None:
        checkpoint.add_lora(options.lora)
    if options.lora_adapter is not None:
        beside = checkpoint.add_lora(options.lora_adapter, decoder=False)
        if beside.touches_vision():
            notes.append(
                "The LoRA changes the vision part too, which no adapter can hold: it is merged into the mmproj file, "
                "which belongs with the adapter now."
            )
    importance = None if options.imatrix is None else read_importance(Path(options.imatrix))
    plan = Plan(
        checkpoint, DECODER_TYPES[decoder_type], VISION_TYPES[vision_type], beside, importance=importance, notes=notes
    )
    if importance is not None:
        importance.check(plan.tensors)
    if plan.recipe.wants_importance and importance is None and options.pictures is None:
        plan.notes.append(
            f"{plan.recipe.label} was made without an importance matrix, which types of so few bits gain most from: "
            "give --calibrate FOLDER or --imatrix FILE."
        )
    return plan


def _suitable_type(checkpoint: Checkpoint) -> str:
    """Default type of the decoder: the one that keeps the checkpoint's own integers, if it has any."""
    kinds = {tensor.block_type for tensor in checkpoint.tensors.values()}
    return recipes.DEFAULT_DECODER_OF_AWQ if recipes.Q.Q4_1 in kinds else recipes.DEFAULT_DECODER


def _with_types(plan: Plan, tensor_types: Sequence[str], vision_tensor_types: Sequence[str]) -> Plan:
    if not tensor_types and not vision_tensor_types:
        return plan
    decoder = choose_types(tensor_types, plan.tensors, recipes.DECODER_OVERRIDES, "--tensor-type")
    vision = choose_types(vision_tensor_types, plan.vision_tensors, recipes.VISION_OVERRIDES, "--vision-tensor-type")
    return replace(plan, decoder_types=decoder, vision_types=vision)


def _weigh(plan: Plan) -> None:
    """Give the tensors that are encoded here an importance matrix; those of a mix get theirs from llama.cpp."""
    if plan.importance is None or plan.recipe.matrix is None:
        return
    squares = plan.importance.squares
    searched = [t.name for t in plan.tensors if t.type not in recipes.NOT_SEARCHED and t.name in squares]
    plan.tensors = [
        replace(t, importance=partial(squares.__getitem__, t.name)) if t.name in searched else t for t in plan.tensors
    ]
    if not searched:
        plan.notes.append(
            f"{plan.importance.name} changes nothing: types of eight and more bits, as in {plan.recipe.label}, have "
            "no scales to search for."
        )


def _write_vision(plan: Plan, mmproj: Path, final: Path, pictures: str | Path | None, progress: Progress) -> None:
    metadata: Callable[[GGUFWriter], None] = partial(vision_metadata, plan.checkpoint, plan.vision)
    with storing(final):
        _write(mmproj, "clip", metadata, plan.vision_tensors, "vision", progress)
    if pictures is not None:
        calibration = calibrate(mmproj, Path(pictures), progress)
        plan.vision_tensors = [*plan.vision_tensors, *smoothing_tensors(calibration)]
        metadata = partial(calibrated_metadata, calibration, metadata)
        with storing(final):
            _write(mmproj, "clip", metadata, plan.vision_tensors, "vision", progress)
    verify_gguf(mmproj, plan.vision_tensors, final.name, types_may_differ=False)


def _write_decoder(
    plan: Plan, decoder: Path, final: Path, progress: Progress, mmproj: Path, pictures: str | Path | None
) -> None:
    def metadata(writer: GGUFWriter) -> None:
        decoder_metadata(plan.checkpoint, writer, plan.recipe.file_type)
        plan.vocabulary.write(writer)

    is_mix = plan.recipe.matrix is None
    if is_mix:
        with storing(final), beside(final) as lossless:
            _write(lossless, "qwen3", metadata, plan.tensors, "decoder", progress)
            if pictures is not None and plan.importance is None:
                plan.importance = observe(lossless, mmproj, Path(pictures), progress)
            quantize_gguf(
                lossless,
                decoder,
                plan.recipe.file_type,
                lambda n, total: progress("quantize", n, total),
                plan.importance,
                plan.decoder_types,
            )
    else:
        with storing(final):
            _write(decoder, "qwen3", metadata, plan.tensors, "decoder", progress)
    verify_gguf(decoder, plan.tensors, final.name, types_may_differ=is_mix)


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
