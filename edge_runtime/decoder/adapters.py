"""LoRA adapters: GGUF files with small products that are added to the decoder's, switched from request to request.

An adapter is checked against its decoder before llama.cpp reads it, because llama.cpp ends the process over keys of a
type it does not expect. All adapters of a model are loaded before its context is created, so that their graphs fit.
What one adapter has computed is useless with another: the scheduler keeps their sequences and calls apart.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from edge_runtime.decoder import llama_cpp as llama
from edge_runtime.errors import MessageError, ModelFileError, UnsupportedModelError
from edge_runtime.weights.gguf_file import GGUFFile
from edge_runtime.weights.identity import file_identity

FLOAT_KIND, STRING_KIND = 6, 8  # GGUF's numbers of key types
ALPHA = "adapter.lora.alpha"
TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0)
SUFFIXES = (".lora_a", ".lora_b")


def check_adapter(path: str | Path, decoder: GGUFFile) -> GGUFFile:
    """Read an adapter and check it against the decoder.

    Raises
    ------
    ModelFileError
        When the file is damaged, is not a LoRA adapter, or was made for another decoder.
    """
    file = GGUFFile(path)
    for key, expected in (
        ("general.type", "adapter"),
        ("general.architecture", decoder.get("general.architecture", str)),
        ("adapter.type", "lora"),
    ):
        found = file.get(key, str, "")
        if found != expected:
            raise ModelFileError(
                f"{file.path.name} has {key} {found[:40]!r}, expected {expected!r}; give a LoRA adapter in GGUF form "
                "(llama.cpp's convert_lora_to_gguf.py makes one)."
            )
    alpha = file.get(ALPHA, float)
    if file.kinds[ALPHA] != FLOAT_KIND or not 0 < alpha < np.inf:
        raise ModelFileError(
            f"{file.path.name}: the key {ALPHA} is {alpha!r} (type {file.kinds[ALPHA]}), expected a positive "
            "float32; convert the adapter again."
        )
    if "adapter.alora.invocation_tokens" in file.metadata:
        raise UnsupportedModelError(
            f"{file.path.name} is an adapter that begins at certain tokens (aLoRA), which is not supported; use a "
            "plain LoRA adapter."
        )
    _check_tensors(file, decoder)
    return file


def _check_tensors(file: GGUFFile, decoder: GGUFFile) -> None:
    targets = set()
    for name, info in file.tensors.items():
        target = name.removesuffix(SUFFIXES[0]).removesuffix(SUFFIXES[1])
        if target == name or target not in decoder.tensors or len(decoder.tensor(target).shape) != 2:
            raise ModelFileError(
                f"{file.path.name} has the tensor {name[:80]!r}, expected pairs NAME.lora_a and NAME.lora_b for "
                f"matrices of {decoder.path.name}; use an adapter that was trained for this model's decoder."
            )
        if target == "token_embd.weight":
            raise UnsupportedModelError(
                f"{file.path.name} changes the token embeddings, expected none of that: text and visual tokens enter "
                "as one stream of embeddings; train the adapter without them."
            )
        if info.type not in TYPES:
            raise UnsupportedModelError(
                f"{file.path.name}: the tensor {name} is stored as {info.type.name}, expected one of "
                f"{', '.join(kind.name for kind in TYPES)}; convert the adapter again."
            )
        targets.add(target)
    if not targets:
        raise ModelFileError(f"{file.path.name} holds no tensors, expected a LoRA adapter; convert it again.")
    for target in targets:
        n_out, n_in = decoder.tensor(target).shape
        a, b = (file.tensor(target + suffix) for suffix in SUFFIXES)
        rank = a.shape[0]
        file.tensor(a.name, (rank, n_in))
        file.tensor(b.name, (n_out, rank))
        if not all(np.isfinite(file.array(info.name)).all() for info in (a, b)):
            raise ModelFileError(
                f"{file.path.name}: the adapter of {target} holds values that are not finite; download or convert it "
                "again."
            )


class Adapters:
    """The adapters of one loaded decoder, by name.

    Parameters
    ----------
    model : llama.cpp's model; its context must be created after this.
    files : file by name.

    Raises
    ------
    ModelFileError
        When one of them cannot be used.
    """

    def __init__(self, model: Any, decoder: GGUFFile, files: Mapping[str, str | Path]) -> None:
        self._lib = llama.library()
        self._loaded: dict[str, Any] = {}
        self.identities: dict[str | None, bytes] = {None: b""}
        """What distinguishes the file from others, by name; None stands for no adapter."""
        for name, path in files.items():
            file = check_adapter(path, decoder)
            with llama.watch_log(lambda line: None):
                adapter = self._lib.llama_adapter_lora_init(model, str(file.path).encode())
            if not adapter:
                self.close()
                raise ModelFileError(
                    f"llama.cpp refuses the adapter {file.path.name}: {llama.last_errors()}; convert it again."
                )
            self._loaded[name] = adapter
            self.identities[name] = file_identity(file)

    def check(self, name: str | None) -> None:
        """Reject a name that was not loaded.

        Raises
        ------
        MessageError
            Listing the names that were.
        """
        if name not in self.identities:
            known = ", ".join(sorted(self._loaded)) or "none"
            raise MessageError(f"adapter is {name!r}; expected one of those the model was loaded with: {known}.")

    def use(self, context: Any, name: str | None) -> None:
        """Use an adapter, or none, for the next calls of a context."""
        chosen = [] if name is None else [self._loaded[name]]
        pointers = (self._lib.llama_adapter_lora_p_ctypes * 1)(*chosen)
        self._lib.llama_set_adapters_lora(context, pointers, len(chosen), (ctypes.c_float * 1)(1.0))

    def close(self) -> None:
        """Free them; the model may be freed afterwards."""
        for adapter in self._loaded.values():
            self._lib.llama_adapter_lora_free(adapter)
        self._loaded.clear()
