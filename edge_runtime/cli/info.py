"""What `edge-runtime info` shows: the machine and the choices made for it, or the contents of a model."""

from __future__ import annotations

import os
import platform
from collections import Counter
from importlib import metadata
from typing import Any

from edge_runtime.cli.made_models import paths_of
from edge_runtime.decoder.kernel_products import kernel_setting
from edge_runtime.version import __version__
from edge_runtime.vision.arithmetic import check_instruction_set
from edge_runtime.weights.config import (
    OWN_PROJECTOR,
    check_mmproj,
    decoder_config,
    resampler_config,
    slicing_config,
    vision_config,
)
from edge_runtime.weights.gguf_file import GGUFFile


def describe_machine() -> dict[str, Any]:
    """Facts about this machine and what the kernels chose for it."""
    from edge_kernels.compile import cache_directory, origin
    from edge_kernels.machine import cpu_count, cpu_name, isa
    from edge_runtime.decoder import llama_cpp as llama

    check_instruction_set()
    off = kernel_setting() is False
    products = "llama.cpp" if off else "llama.cpp, products of quantised weights and attention in these kernels"
    from edge_kernels.linear.gguf_blocks import IS_POSSIBLE  # reads the instruction set when imported

    return {
        "edge-runtime": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "kernels": isa(),
        "prompts": "these kernels (AMX)" if IS_POSSIBLE else products,
        "answers": products,
        "threads": cpu_count(),
        "compiled kernels": origin(),
        "kernel cache": str(cache_directory() or "none (not writable)"),
        "numba": metadata.version("numba"),
        "llama-cpp-python": metadata.version("llama-cpp-python"),
        "video files": _video_library(),
        "llama.cpp": llama.library().llama_print_system_info().decode().strip(" |"),
    }


def _video_library() -> str:
    try:
        return f"PyAV {metadata.version('av')}"
    except metadata.PackageNotFoundError:
        return "not installed: pip install 'edge-runtime[video]'"


def describe_model(name: str) -> dict[str, Any]:
    """Contents of a model: of both its files, or of one .gguf file."""
    if os.path.isfile(name):  # noqa: PTH113 - Path.is_file raises where permission is denied
        file = GGUFFile(name)
        is_mmproj = file.metadata.get("general.architecture") == "clip"
        return _describe_mmproj(file) if is_mmproj else _describe_decoder(file)
    paths = paths_of(name)
    decoder, mmproj = GGUFFile(paths.decoder), GGUFFile(paths.mmproj)
    return {"model": paths.name, **_describe_decoder(decoder), **_describe_mmproj(mmproj)}


def _describe_decoder(file: GGUFFile) -> dict[str, Any]:
    config = decoder_config(file)
    return {
        "decoder": file.path.name,
        **_contents("decoder", file),
        "layers": file.get("qwen3.block_count", int),
        "hidden size": config.hidden,
        "vocabulary": config.vocabulary,
        "context length": config.context_length,
    }


def _describe_mmproj(file: GGUFFile) -> dict[str, Any]:
    check_mmproj(file)
    vision, resampler, slicing = vision_config(file), resampler_config(file), slicing_config(file)
    return {
        "mmproj": file.path.name,
        **_contents("mmproj", file),
        "mmproj for": "edge-runtime alone"
        if file.get("clip.projector_type", str) == OWN_PROJECTOR
        else "llama.cpp too",
        "vision layers": vision.layers,
        "vision width": vision.width,
        "visual tokens per slice": resampler.queries,
        "slice side": f"{slicing.scale_resolution} pixels in patches of {slicing.patch_size}",
        "most cells per picture": slicing.max_slice_nums,
    }


def _contents(what: str, file: GGUFFile) -> dict[str, Any]:
    parameters = sum(tensor.n_elements for tensor in file.tensors.values())
    n_bytes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        n_bytes[tensor.type.name] += tensor.n_bytes
    return {
        f"{what} size": f"{file.size_bytes / 1e6:.1f} MB",
        f"{what} parameters": f"{parameters / 1e6:.2f} M",
        f"{what} bits per weight": round(8 * sum(n_bytes.values()) / parameters, 2),
        f"{what} types": {kind: f"{size / 1e6:.1f} MB" for kind, size in n_bytes.most_common()},
    }
