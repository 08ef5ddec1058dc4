"""A Hugging Face checkpoint in MiniCPM-V 4.5's official layout, read lazily: a folder enters, rows of tensors leave.

Shards are read in chunks of rows, never mapped, so that a 17 GB checkpoint costs a few megabytes of memory. The
safetensors header is parsed here and not by the safetensors library, because that one hands bfloat16 to torch only.

Source of the format: the safetensors README (8 bytes header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_runtime.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
STORED_DTYPES: dict[str, tuple[str, int]] = {"F32": ("<f4", 4), "F16": ("<f2", 2), "BF16": ("<u2", 2)}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a shard."""

    name: str
    shard: Path
    dtype: str
    """F32, F16 or BF16."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the shard."""

    @property
    def n_rows(self) -> int:
        """Length of the first axis (1 for a scalar)."""
        return self.shape[0] if self.shape else 1

    @property
    def row_length(self) -> int:
        """Values per entry of the first axis."""
        return math.prod(self.shape[1:])


class Checkpoint:
    """A checkpoint folder: its configuration files and an index of its tensors.

    Raises
    ------
    CheckpointError
        When the folder is no MiniCPM-V 4.5 checkpoint in the official layout, or a shard is missing or damaged.
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
        """Parsed JSON file of the folder, always an object, or None when it is not there."""
        text = self.text(name)
        if text is None:
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{name} is not readable JSON ({error}); download the checkpoint again.") from None
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{name} holds a {type(value).__name__}, expected a JSON object; download the checkpoint again."
            )
        return value

    def text(self, name: str) -> str | None:
        """Text file of the folder, or None when it is not there."""
        try:
            return (self.folder / name).read_text("utf-8")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name} is not readable text ({error}); download the checkpoint again.") from None

    def size(self, *keys: str, default: int | None = None) -> int:
        """Nested whole number of config.json that must be there, unless it has a default."""
        return int(self.number(*keys, default=default))

    def number(self, *keys: str, default: float | None = None) -> float:
        """Nested number of config.json that must be there, unless it has a default."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(
                f"config.json holds {value!r} for {'.'.join(keys)}, expected a number; use an unmodified config.json."
            )
        return value

    def rows(self, name: str, start: int, stop: int) -> tuple[npt.NDArray[Any], str]:
        """Rows [start, stop) of a tensor as stored.

        Returns
        -------
        values : ndarray [shape=(stop - start, row_length), float32, float16, or the bits of bfloat16 as uint16].
        dtype : F32, F16 or BF16.
        """
        tensor = self.tensors[name]
        kind, size = STORED_DTYPES[tensor.dtype]
        row_bytes = tensor.row_length * size
        wanted = (stop - start) * row_bytes
        raw = bytearray(wanted)
        view, done = memoryview(raw), 0
        try:
            with tensor.shard.open("rb", buffering=0) as file:
                file.seek(tensor.offset + start * row_bytes)
                while done < wanted:  # one read returns at most 2 GiB
                    if not (n := file.readinto(view[done:])):
                        raise CheckpointError(
                            f"{tensor.shard.name} ends inside {name}; download the checkpoint again."
                        )
                    done += n
        except OSError as error:
            raise CheckpointError(f"{tensor.shard} cannot be read: {error.strerror}; check the disk.") from None
        return np.frombuffer(raw, kind).reshape(stop - start, tensor.row_length), tensor.dtype

    def float_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows [start, stop) as float32: ndarray [shape=(stop - start, row_length), float32]."""
        values, dtype = self.rows(name, start, stop)
        if dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)

    def _index(self) -> dict[str, StoredTensor]:
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
            raise CheckpointError(
                f"{self.folder} holds no *.safetensors file; expected the weights of the checkpoint."
            )
        tensors: dict[str, StoredTensor] = {}
        for shard in shards:
            for tensor in _read_header(shard):
                if tensor.name in tensors:
                    raise CheckpointError(
                        f"{tensor.name} is in {tensors[tensor.name].shard.name} and in {shard.name}; keep only the "
                        "files of one checkpoint in the folder."
                    )
                tensors[tensor.name] = tensor
        if index is not None and (absent := sorted(set(index["weight_map"]) - set(tensors))):
            raise CheckpointError(
                f"The shards lack tensors of their index ({len(absent)}, such as {absent[0]}); download them again."
            )
        return tensors


def _check_architecture(config: dict[str, Any]) -> None:
    """Refuse what is no MiniCPM-V 4.5, before any weight is read."""
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
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"This checkpoint is already quantised ({method}); use the bfloat16 checkpoint openbmb/MiniCPM-V-4_5 "
            "instead."
        )
    for key, expected in (("rope_scaling", None), ("attention_bias", False), ("hidden_act", "silu")):
        if config.get(key, expected) != expected:
            raise CheckpointError(
                f"config.json sets {key} to {config[key]!r}, expected {expected!r}; this variant of the decoder is "
                "not supported."
            )


def _read_header(shard: Path) -> list[StoredTensor]:
    """Parse and check the header of one safetensors file."""

    def broken(what: str) -> CheckpointError:
        return CheckpointError(f"{shard.name} is not a usable safetensors file: {what}; download it again.")

    try:
        size = shard.stat().st_size
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise broken(f"its header claims {length} of {size} bytes")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{shard} cannot be read: {error.strerror}; check its permissions.") from None
    except (ValueError, RecursionError):
        raise broken("its header is no JSON") from None
    if not isinstance(header, dict):
        raise broken("its header is no JSON object")
    header.pop("__metadata__", None)
    return [_entry(shard, name, entry, 8 + length, size, broken) for name, entry in header.items()]


def _entry(shard: Path, name: str, entry: Any, data_start: int, size: int, broken: Any) -> StoredTensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise broken(f"the entry of {name} is incomplete") from None
    if dtype not in STORED_DTYPES:
        raise CheckpointError(
            f"{shard.name}: {name} is stored as {dtype}; expected F32, F16 or BF16, as in the checkpoint "
            "openbmb/MiniCPM-V-4_5."
        )
    n_bytes = math.prod(shape) * STORED_DTYPES[dtype][1]
    if min((*shape, begin), default=0) < 0 or end - begin != n_bytes or data_start + end > size:
        raise broken(f"{name} of shape {shape} does not lie inside the file at bytes {begin} to {end}")
    return StoredTensor(name, shard, dtype, shape, data_start + begin)
