"""Changed copies of a checkpoint: other shards, other dtypes, missing or damaged parts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ITEM_BYTES = {"F64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
INDEX = "model.safetensors.index.json"


@dataclass
class Stored:
    """A tensor as it stands in a shard."""

    dtype: str
    shape: tuple[int, ...]
    raw: bytes

    @property
    def values(self) -> npt.NDArray[np.float32]:
        if self.dtype == "BF16":
            return (np.frombuffer(self.raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        return (
            np.frombuffer(self.raw, {"F32": "<f4", "F16": "<f2"}[self.dtype]).astype(np.float32).reshape(self.shape)
        )


def stored(values: npt.NDArray[np.float32], dtype: str = "F32") -> Stored:
    """Store values; as BF16 they must be exact, since its rounding is not this helper's business."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype != "BF16":
        return Stored(dtype, values.shape, values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes())
    bits = values.view(np.uint32)
    assert not (bits & 0xFFFF).any(), "not exact in bfloat16"
    return Stored(dtype, values.shape, (bits >> 16).astype("<u2").tobytes())


@dataclass
class CheckpointCopy:
    """A checkpoint in memory, to be changed and written somewhere."""

    files: dict[str, Any]
    """JSON files by name, parsed; other files as bytes."""
    tensors: dict[str, Stored] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> CheckpointCopy:
        files: dict[str, Any] = {}
        tensors: dict[str, Stored] = {}
        for path in sorted(folder.iterdir()):
            if path.suffix == ".safetensors":
                tensors |= read_shard(path)
            elif path.name != INDEX:
                files[path.name] = json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()
        return cls(files, tensors)

    @property
    def config(self) -> dict[str, Any]:
        return self.files["config.json"]  # type: ignore[no-any-return]

    def write(self, folder: Path, n_shards: int = 1, *, with_index: bool | None = None) -> Path:
        """Write the copy; an index is written when there are several shards, unless told otherwise."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        names, weight_map = list(self.tensors), {}
        for number in range(n_shards):
            shard = f"model-{number + 1:05}-of-{n_shards:05}.safetensors" if n_shards > 1 else "model.safetensors"
            part = {name: self.tensors[name] for name in names[number::n_shards]}
            (folder / shard).write_bytes(shard_bytes(part))
            weight_map |= dict.fromkeys(part, shard)
        if with_index if with_index is not None else n_shards > 1:
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder


def read_shard(path: Path) -> dict[str, Stored]:
    """Tensors of a safetensors file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: Stored(entry["dtype"], tuple(entry["shape"]), data[start + begin : start + end])
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def shard_bytes(tensors: dict[str, Stored]) -> bytes:
    """A safetensors file, written by hand: the library knows bfloat16 only with torch."""
    header, position = {}, 0
    for name, tensor in tensors.items():
        assert len(tensor.raw) == math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        offsets = [position, position + len(tensor.raw)]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        position += len(tensor.raw)
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(tensor.raw for tensor in tensors.values())
