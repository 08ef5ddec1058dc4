"""A Hugging Face checkpoint in MiniCPM-V 4.5's official layout, read lazily: a folder enters, rows of tensors leave.

Quantised checkpoints (bitsandbytes, AutoAWQ) and LoRA folders look the same from outside: tensors under the official
names, whose values are computed as they are read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from edge_converters.sources import awq, nf4
from edge_converters.sources.lora import Lora, read_lora
from edge_converters.sources.safetensors import FLOATS, Float32, SourceTensor, StoredTensor, read_index
from edge_runtime.errors import CheckpointError
from edge_runtime.system.text_files import parse_json, read_text

QUANTIZED = {"bitsandbytes": "4 bits", "awq": "4 bits in the GEMM layout"}
MAX_TEXT_BYTES = 256 << 20
"""For a JSON or text file; the official tokenizer.json has 11 MB."""
MAX_LAYERS, MAX_SIZE, MAX_VALUE = 1000, 1 << 24, 1e30
"""Of layers, of any other size, and of any number: far above any model, far below what would take for ever."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Checkpoint:
    """A checkpoint folder: its configuration files and an index of its tensors.

    Raises
    ------
    CheckpointError
        When the folder is not a MiniCPM-V 4.5 checkpoint in the official layout, or a shard is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not os.path.isdir(self.folder):  # noqa: PTH112 - Path.is_dir raises where permission is denied
            raise CheckpointError(
                f"{self.folder} is no folder; expected a Hugging Face checkpoint: a folder with config.json and "
                "*.safetensors."
            )
        self.config = self.json("config.json")
        if self.config is None:
            raise CheckpointError(f"{self.folder} has no config.json; expected a checkpoint in the official layout.")
        self.preprocessor = self.json("preprocessor_config.json") or {}
        _check_architecture(self.config)
        self.tensors = self._index()

    def json(self, name: str) -> Any:
        """Parsed JSON file of the folder, always an object, or None if it does not exist."""
        text = self.text(name)
        if text is None:
            return None
        try:
            value = parse_json(text)
            if "\\u" in text:  # lone surrogates, which no file can hold
                json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{name} is not readable JSON ({error}); download the checkpoint again.") from None
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{name} holds a {type(value).__name__}, expected a JSON object; download the checkpoint again."
            )
        return value

    def text(self, name: str) -> str | None:
        """Text file of the folder, or None if it does not exist."""
        try:
            return read_text(self.folder / name, MAX_TEXT_BYTES)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name} is not readable text ({error}); download the checkpoint again.") from None

    def size(self, *keys: str, default: int | None = None) -> int:
        """Nested positive integer from config.json, required unless there is a default."""
        value = self.number(*keys, default=default)
        most = MAX_LAYERS if keys[-1] == "num_hidden_layers" else MAX_SIZE
        if value != int(value) or not 1 <= value <= most:
            raise CheckpointError(
                f"config.json holds {value!r} for {'.'.join(keys)}, expected a whole number from 1 to {most}; use an "
                "unmodified config.json."
            )
        return int(value)

    def number(self, *keys: str, default: float | None = None) -> float:
        """Nested positive number from config.json, required unless there is a default."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MAX_VALUE:
            raise CheckpointError(
                f"config.json holds {_short(value)} for {'.'.join(keys)}, expected a number above 0; use an "
                "unmodified config.json."
            )
        return value

    def float_rows(self, name: str, start: int, stop: int) -> Float32:
        """Rows [start, stop) as float32: ndarray [shape=(stop - start, row_length), float32]."""
        return self.tensors[name].float_rows(start, stop)

    def add_lora(self, folder: str | Path, *, decoder: bool = True) -> Lora:
        """Merge a LoRA folder into the tensors.

        Parameters
        ----------
        decoder : false leaves the decoder unchanged, for an adapter file.

        Raises
        ------
        CheckpointError
            When the folder is not a LoRA of this model.
        """
        lora = read_lora(folder, self.tensors)
        self.tensors = lora.merged(self.tensors, decoder=decoder)
        return lora

    def _index(self) -> dict[str, SourceTensor]:
        shards = sorted(path for path in self.folder.glob("*.safetensors") if path.is_file())
        index = self.json("model.safetensors.index.json")
        if index is not None:
            if not isinstance(index.get("weight_map"), dict):
                raise CheckpointError("model.safetensors.index.json has no weight_map; download it again.")
            wanted = sorted({str(name) for name in index["weight_map"].values()})
            if any(Path(name).name != name for name in wanted):
                raise CheckpointError(
                    "model.safetensors.index.json names files outside the folder; download it again."
                )
            missing = [name for name in wanted if not (self.folder / name).is_file()]
            if missing:
                raise CheckpointError(
                    f"{self.folder} lacks {', '.join(missing[:4])} of {len(wanted)} shards; download the missing "
                    "files."
                )
            shards = [self.folder / name for name in wanted]
        if not shards:
            raise CheckpointError(self._no_weights())
        stored = read_index(shards)
        if index is not None and (absent := sorted(set(index["weight_map"]) - set(stored))):
            raise CheckpointError(
                f"The shards lack tensors of their index ({len(absent)}, such as {absent[0]}); download them again."
            )
        tensors = awq.assemble(nf4.assemble(dict(stored)))
        for tensor in tensors.values():
            if isinstance(tensor, StoredTensor) and tensor.dtype not in FLOATS:
                raise CheckpointError(
                    f"{tensor.file.name}: {tensor.name} is stored as {tensor.dtype}; expected F32, F16 or BF16, as "
                    "in the checkpoint openbmb/MiniCPM-V-4_5."
                )
        return tensors

    def _no_weights(self) -> str:
        pickles = sorted(path.name for kind in PICKLES for path in self.folder.glob(kind))
        if not pickles:
            return f"{self.folder} holds no *.safetensors file; expected the weights of the checkpoint."
        return (
            f"{self.folder} holds its weights as {pickles[0]}, a format that runs code when it is read, and no "
            "*.safetensors file; load the checkpoint in PyTorch and save it with save_pretrained(FOLDER), which "
            "writes safetensors."
        )


def _short(value: object) -> str:
    """A value as JSON-like text of bounded length: numbers may have thousands of digits."""
    try:
        return repr(value)[:40]
    except ValueError:  # more digits than Python prints
        return "an enormous number"


def _check_architecture(config: dict[str, Any]) -> None:
    """Refuse anything but MiniCPM-V 4.5, before any weight is read."""
    if config.get("model_type") != "minicpmv":
        raise CheckpointError(
            f"config.json is of model_type {config.get('model_type')!r}; only 'minicpmv' (MiniCPM-V 4.5) can be "
            "converted."
        )
    version = config.get("version")
    if str(version) != "4.5":
        raise CheckpointError(
            f"This is MiniCPM-V version {version}; only 4.5 can be converted, whose resampler knows time."
        )
    _check_quantization(config.get("quantization_config"))
    for key, expected in (("rope_scaling", None), ("attention_bias", False), ("hidden_act", "silu")):
        if config.get(key, expected) != expected:
            raise CheckpointError(
                f"config.json sets {key} to {config[key]!r}, expected {expected!r}; this variant of the decoder is "
                "not supported."
            )


def _check_quantization(settings: Any) -> None:
    """Refuse quantised checkpoints of kinds that cannot be read."""
    if not settings:
        return
    known = settings if isinstance(settings, dict) else {"quant_method": settings}
    method = str(known.get("quant_method"))[:40]
    four_bits = known.get("load_in_4bit") if method == "bitsandbytes" else known.get("bits", 4) == 4
    layout = str(known.get("version", "gemm")).lower() if method == "awq" else "gemm"
    if method not in QUANTIZED or not four_bits or layout != "gemm":
        kinds = " and ".join(f"{name} with {what}" for name, what in QUANTIZED.items())
        raise CheckpointError(
            f"This checkpoint is already quantised ({method}); of such, only {kinds} can be read: use one of them, "
            "or the bfloat16 checkpoint openbmb/MiniCPM-V-4_5."
        )
