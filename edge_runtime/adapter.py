"""A LoRA adapter in a GGUF file → added to the decoder by llama.cpp, for as long as the model is loaded.

Everything that llama.cpp would trust is checked against the decoder first: kinds, pairs, shapes, types. An adapter
has for a matrix [outputs, inputs] of the decoder, under its name, `.lora_a` [r, inputs] and `.lora_b` [outputs, r].
"""

from __future__ import annotations

import ctypes
import math
import re
from pathlib import Path
from typing import Any

from edge_runtime import llama
from edge_runtime.errors import ModelFileError
from edge_runtime.weights import GGUFFile

KINDS = {"general.type": "adapter", "general.architecture": "qwen3", "adapter.type": "lora"}
KEY_ALPHA, KEY_TRIGGER = "adapter.lora.alpha", "adapter.alora.invocation_tokens"
FLOAT32 = 6  # number of the type in GGUF
SUFFIXES = (".lora_a", ".lora_b")
TYPES = frozenset({"F32", "F16", "BF16", "Q8_0"})


def attach_adapter(model: Any, context: Any, decoder: GGUFFile, path: Path) -> None:
    """Add an adapter to a context of llama.cpp; the model frees it.

    Raises
    ------
    ModelFileError
        When the file is no adapter of this decoder.
    """
    check_adapter(GGUFFile(path), decoder)
    lib = llama.library()
    with llama.watch_log(lambda line: None):
        adapter = lib.llama_adapter_lora_init(model, str(path).encode())
        if not adapter:
            raise ModelFileError(f"llama.cpp refuses the adapter {path.name}: {llama.last_errors()}; write it again.")
        adapters, scales = (lib.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
        if lib.llama_set_adapters_lora(context, adapters, 1, scales) != 0:
            raise ModelFileError(f"llama.cpp cannot use {path.name}: {llama.last_errors()}; write the adapter again.")


def check_adapter(file: GGUFFile, decoder: GGUFFile) -> None:
    """Hold an adapter against its decoder.

    Raises
    ------
    ModelFileError
        Naming the first thing that is not as expected.
    """

    def wrong(what: str) -> ModelFileError:
        return ModelFileError(
            f"{file.path.name} {what}; expected a LoRA adapter for {decoder.path.name}, as 'edge-runtime convert "
            "--lora-adapter' writes it."
        )

    for key, expected in KINDS.items():
        if (value := file.metadata.get(key)) != expected:
            raise wrong(f"has {str(value)[:40]!r} for {key}")
    # llama.cpp ends the process over an alpha that is stored as anything but float32.
    if file.kinds.get(KEY_ALPHA) != FLOAT32 or not math.isfinite(file.metadata[KEY_ALPHA]):
        raise wrong(f"holds {str(file.metadata.get(KEY_ALPHA))[:40]!r} for {KEY_ALPHA}, no float32 number")
    if KEY_TRIGGER in file.metadata:
        raise wrong("is switched by tokens, which is not supported")
    targets = sorted({re.sub(r"\.lora_[ab]$", "", name) for name in file.tensors})
    for name in targets:
        pair = [file.tensors.get(name + suffix) for suffix in SUFFIXES]
        base = decoder.tensors.get(name)
        if base is None or len(base.shape) != 2 or name == "token_embd.weight":
            raise wrong(f"changes {name[:80]!r}, which is no matrix of the decoder")
        a, b = pair
        if a is None or b is None or a.type.name not in TYPES or b.type.name not in TYPES:
            raise wrong(f"lacks one of the two matrices for {name}, or has it in another type than float or Q8_0")
        fits = len(a.shape) == len(b.shape) == 2 and a.shape[1] == base.shape[1] and b.shape[0] == base.shape[0]
        if not fits or a.shape[0] != b.shape[1]:
            raise wrong(f"has matrices of shapes {a.shape} and {b.shape} for {name} of {base.shape}")
    if not targets:
        raise wrong("changes nothing")
