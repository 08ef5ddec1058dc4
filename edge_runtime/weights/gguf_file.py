"""Memory-mapped GGUF reader: a file enters; metadata and tensors, as float32 or as stored blocks, leave.

Every number of the header is checked against the length of the file before anything is allocated, mapped or handed
to llama.cpp, which trusts its input and would read past the end or abort the process. A damaged file raises
`ModelFileError`. Knows nothing about models: `config` knows what the keys and tensors mean.

One thing goes beyond the format: rows whose length is not a multiple of the block size of their type are stored with
zeros up to the end of their last block, and a key

    edge_runtime.row_length.<TENSOR>   uint32   values per row that count, less than a block below the stored length

says so. `TensorInfo.shape`, `array` and `rows` show only the values that count; other programs see the longer rows.

Source: the GGUF specification of ggml (docs/gguf.md) and ggml's own loader, whose limits are kept: at most 4
dimensions, names shorter than 64 bytes, alignment a power of two, little endian, versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from edge_runtime.errors import ModelFileError, UnsupportedModelError
from edge_runtime.weights import blocks
from edge_runtime.weights.blocks import BlockParts, Bytes
from edge_runtime.weights.memory_map import Region, check_unchanged, map_file, region_bytes, release_pages

Float32 = blocks.Float32

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32  # bytes
MAX_DIMS = 4
MAX_NAME_BYTES = 63
MAX_KEY_BYTES = 65535
KEY_ROW_LENGTH = "edge_runtime.row_length."
MAX_ELEMENTS = 1 << 40  # per tensor; far above any model, far below an overflow in anybody's int64

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_ARRAY_DTYPES = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

_KIND_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list of strings",
    np.ndarray: "a list of numbers",
}

T = TypeVar("T")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in the file."""

    name: str
    shape: tuple[int, ...]
    """NumPy order: rows before columns (GGUF stores the reverse)."""
    type: GGMLQuantizationType
    offset: int
    """Bytes from the start of the file."""
    n_bytes: int
    padding: int = 0
    """Number of zeros stored after each row's own values."""

    @property
    def n_rows(self) -> int:
        """Number of rows when every axis but the last is flattened."""
        return math.prod(self.shape[:-1])

    @property
    def n_elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class GGUFFile:
    """A checked, memory-mapped GGUF file.

    Parameters
    ----------
    path : the file.

    Attributes
    ----------
    metadata : key → value; arrays of numbers are ndarrays, arrays of strings are lists.
    kinds : key → GGUF's number for its type.
    tensors : name → `TensorInfo`, in file order.

    Raises
    ------
    ModelFileError
        When the file is missing, is not a GGUF file, is cut short, or contradicts itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._data = map_file(self.path)
        header = _Header(self.path, self._data)
        self.metadata, self.kinds = header.metadata, header.kinds
        self.tensors = header.tensors
        self.alignment = header.alignment

    @overload
    def get(self, key: str, kind: type[T]) -> T: ...
    @overload
    def get(self, key: str, kind: type[T], default: T) -> T: ...
    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Metadata value of `key` as `kind`; `ModelFileError` if it is missing or of another type."""
        value = self.metadata.get(key, default)
        if value is None:
            raise ModelFileError(
                f"{self.path.name}: the key {key} is missing; the file was not made for this runtime or is "
                "damaged; convert or download it again."
            )
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelFileError(
                f"{self.path.name}: the key {key} holds {_KIND_NAMES.get(type(value), 'something else')}, "
                f"{str(value)[:40]!r}, expected {_KIND_NAMES.get(kind, kind.__name__)}; convert or download the file "
                "again."
            )
        return value

    def strings(self, key: str) -> list[str]:
        """Metadata array of strings."""
        value = self.get(key, list)
        if not all(isinstance(item, str) for item in value):
            raise ModelFileError(f"{self.path.name}: the key {key} is not a list of strings; convert the file again.")
        return value

    def tensor(self, name: str, shape: Sequence[int] | None = None) -> TensorInfo:
        """Look up a tensor, optionally checking its shape against the one the configuration asks for."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileError(
                f"{self.path.name}: the tensor {name} is missing; the file is incomplete or belongs to another "
                "model; convert or download it again."
            )
        if shape is not None and info.shape != tuple(shape):
            raise ModelFileError(
                f"{self.path.name}: the tensor {name} has shape {info.shape}, expected {tuple(shape)} from the "
                "file's own configuration; convert or download it again."
            )
        return info

    def blocks(self, name: str) -> Bytes:
        """Stored bytes of a tensor, padding included, not copied: ndarray [shape=(rows, bytes per row), uint8]."""
        info = self.tensor(name)
        raw = self._data[info.offset : info.offset + info.n_bytes]
        return raw.reshape(info.n_rows, -1)

    def parts(self, name: str) -> BlockParts:
        """Scales and integers of a Q8_0 or Q4_0 tensor, not copied; padded rows have zeros after their values.

        Raises
        ------
        UnsupportedModelError
            When the tensor is of another type.
        ModelFileError
            When the padding of rows is not zero.
        """
        info, stored = self.tensor(name), self.blocks(name)
        self._check_padding(info, stored)
        try:
            return blocks.parts(stored, info.type)
        except NotImplementedError:
            raise UnsupportedModelError(
                f"{self.path.name}: the tensor {name} is stored as {info.type.name}, expected Q8_0 or Q4_0; convert "
                "the file again."
            ) from None

    def array(self, name: str, shape: Sequence[int] | None = None) -> Float32:
        """A tensor as float32, dequantised: ndarray [shape=`TensorInfo.shape`, float32, C-contiguous]."""
        info = self.tensor(name, shape)
        return self.rows(name, slice(None)).reshape(info.shape)

    def rows(self, name: str, index: npt.NDArray[np.int64] | slice) -> Float32:
        """Chosen rows of a tensor as float32: ndarray [shape=(n, columns), float32]; only those rows are read.

        Raises
        ------
        UnsupportedModelError
            When the tensor's type has no dequantiser.
        ModelFileError
            When the padding of rows is not zero.
        """
        info = self.tensor(name)
        chosen = np.ascontiguousarray(self.blocks(name)[index])
        if not chosen.size:  # gguf's dequantisers cannot reshape nothing
            return np.zeros((0, info.shape[-1]), np.float32)
        self._check_padding(info, chosen)
        try:
            return blocks.dequantize(chosen, info.type, info.shape[-1] if info.padding else None)
        except (NotImplementedError, KeyError):
            raise UnsupportedModelError(
                f"{self.path.name}: the tensor {name} is stored as {info.type.name}, which cannot be read here; "
                "use a file with F32, F16, BF16, Q8_0, Q4_0, K-quants or IQ types."
            ) from None

    def _check_padding(self, info: TensorInfo, stored: Bytes) -> None:
        """Refuse rows whose padding is not zero: those values would be missing from the row."""
        if not info.padding:
            return
        last = np.ascontiguousarray(stored[:, -GGML_QUANT_SIZES[info.type][1] :])
        if blocks.dequantize(last, info.type)[:, -info.padding :].any():
            raise ModelFileError(
                f"{self.path.name}: rows of {info.name} hold more after their {info.shape[-1]} values, expected "
                "zeros there; the file is damaged: download or convert it again."
            )

    @cached_property
    def size_bytes(self) -> int:
        """Length of the file."""
        return int(self._data.size)

    def tensor_bytes(self, region: Region | None) -> tuple[Bytes, int]:
        """Bytes of all tensors, from another mapping of the file if that region holds them all.

        Returns
        -------
        data, first : ndarray [shape=(n,), uint8], and its offset in the file.
        """
        first = min(info.offset for info in self.tensors.values())
        end = max(info.offset + info.n_bytes for info in self.tensors.values())
        found = None if region is None else region_bytes(region, first, end)
        return (self._data[first:end] if found is None else found), first

    def check_unchanged(self) -> None:
        """Raise `ModelFileError` when the file was written to since it was opened."""
        check_unchanged(self._data, self.path)

    def release_pages(self) -> None:
        """Give the pages that were read back to the system; the next access reads them from the file again."""
        release_pages(self._data)


def _printable(text: str) -> str:
    """A name from a damaged file, which may be long or hold control characters, made fit for a terminal."""
    return "".join(c if c.isprintable() else "�" for c in text[:300])


class _Header:
    """One pass over the header, checking every count and length against what is left of the file."""

    def __init__(self, path: Path, data: npt.NDArray[np.uint8]) -> None:
        self.path, self.size, self.position = path, int(data.size), 0
        self.view = data.data
        self.metadata: dict[str, Any] = {}
        self.kinds: dict[str, int] = {}
        self.tensors: dict[str, TensorInfo] = {}
        n_tensors, n_keys = self._preamble()
        for _ in range(n_keys):
            self._key()
        self.alignment = self._alignment()
        infos = [self._tensor_info() for _ in range(n_tensors)]
        start = -(-self.position // self.alignment) * self.alignment
        for name, shape, kind, offset in infos:
            self._place(name, shape, kind, start, offset)
        for key in self.metadata:
            if key.startswith(KEY_ROW_LENGTH) and key.removeprefix(KEY_ROW_LENGTH) not in self.tensors:
                raise self.broken(f"it has the key {key}, but no such tensor")

    def broken(self, what: str) -> ModelFileError:
        return ModelFileError(
            f"{self.path.name} is not a usable GGUF file: {_printable(what)}; download or convert it again."
        )

    def take(self, n_bytes: int, what: str) -> int:
        """Advance over `n_bytes` and return where they start."""
        start = self.position
        if n_bytes > self.size - start:
            raise self.broken(f"it ends inside {what} (byte {start} + {n_bytes} of {self.size})")
        self.position = start + n_bytes
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.view, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.view, self.take(8, what))[0])

    def text(self, what: str, limit: int | None = None) -> str:
        length = self.u64(what)
        if limit is not None and length > limit:
            raise self.broken(f"{what} is {length} bytes long, at most {limit} are allowed")
        start = self.take(length, what)
        try:
            return str(self.view[start : start + length], "utf-8")
        except UnicodeDecodeError:
            raise self.broken(f"{what} is not valid UTF-8") from None

    def _preamble(self) -> tuple[int, int]:
        magic = bytes(self.view[self.take(4, "the magic number") :][:4])
        if magic != MAGIC:
            raise self.broken(f"it starts with {magic!r} instead of {MAGIC!r}")
        version = self.u32("the version")
        if version not in VERSIONS:
            raise self.broken(f"it has version {version}, versions 2 and 3 (little endian) can be read")
        n_tensors, n_keys = self.u64("the tensor count"), self.u64("the key count")
        # A tensor entry takes at least 24 bytes and a key at least 13: absurd counts fail here, not after hours.
        if n_tensors * 24 + n_keys * 13 > self.size:
            raise self.broken(f"it announces {n_tensors} tensors and {n_keys} keys in {self.size} bytes")
        return n_tensors, n_keys

    def _key(self) -> None:
        key = self.text("a key", MAX_KEY_BYTES)
        if key in self.metadata:
            raise self.broken(f"the key {key} occurs twice")
        self.kinds[key] = self.u32(f"the type of {key}")
        self.metadata[key] = self._value(self.kinds[key], key)

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text(f"the value of {key}")
        if kind == _ARRAY:
            return self._array(key)
        if kind == 7:
            return self.view[self.take(1, f"the value of {key}")] != 0
        if kind not in _SCALARS:
            raise self.broken(f"the key {key} has the unknown type {kind}")
        scalar = _SCALARS[kind]
        return scalar.unpack_from(self.view, self.take(scalar.size, f"the value of {key}"))[0]

    def _array(self, key: str) -> Any:
        what = f"the array {key}"
        kind, count = self.u32(what), self.u64(what)
        if kind == _STRING:
            if count * 8 > self.size - self.position:
                raise self.broken(f"{what} announces {count} strings, more than the file can hold")
            return self._strings(count, what)
        if kind not in _ARRAY_DTYPES:
            raise self.broken(f"{what} has the element type {kind}, which is unknown or nested")
        dtype = np.dtype(_ARRAY_DTYPES[kind])
        start = self.take(count * dtype.itemsize, what)
        raw = self.view[start : start + count * dtype.itemsize]
        if kind == 7:
            return np.frombuffer(raw, np.uint8) != 0
        return np.frombuffer(raw, dtype)

    def _strings(self, count: int, what: str) -> list[str]:
        """`count` strings; inlined because vocabularies have 300,000 of them."""
        view, size, position, unpack = self.view, self.size, self.position, _U64.unpack_from
        items = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(view, position)[0]
                if position > size:
                    raise self.broken(f"it ends inside {what}")
                items.append(str(view[start:position], "utf-8"))
        except struct.error:
            raise self.broken(f"it ends inside {what}") from None
        except UnicodeDecodeError:
            raise self.broken(f"an element of {what} is not valid UTF-8") from None
        self.position = position
        return items

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.broken(f"its alignment is {str(alignment)[:20]}, expected a power of two from 8 to 1048576")
        return alignment

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text("a tensor name", MAX_NAME_BYTES)
        n_dims = self.u32(f"the tensor {name}")
        if not 1 <= n_dims <= MAX_DIMS:
            raise self.broken(f"the tensor {name} has {n_dims} dimensions, expected 1 to {MAX_DIMS}")
        shape = tuple(self.u64(f"the shape of {name}") for _ in range(n_dims))[::-1]
        return name, shape, self.u32(f"the type of {name}"), self.u64(f"the offset of {name}")

    def _place(self, name: str, shape: tuple[int, ...], kind: int, start: int, offset: int) -> None:
        """Check one tensor's type, shape and bounds, and add it. Python's integers cannot overflow."""
        if name in self.tensors:
            raise self.broken(f"the tensor {name} occurs twice")
        if 0 in shape or math.prod(shape) > MAX_ELEMENTS:
            raise self.broken(f"the tensor {name} has the impossible shape {shape}")
        try:
            tensor_type = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[tensor_type]
        except (ValueError, KeyError):
            raise UnsupportedModelError(
                f"{self.path.name}: the tensor {_printable(name)} has the unknown type {kind}; the file is damaged "
                "or newer than this version; update edge-runtime or convert the file again."
            ) from None
        if shape[-1] % block:
            raise self.broken(
                f"the rows of {name} have {shape[-1]} values, no multiple of the {tensor_type.name} block of {block}"
            )
        n_bytes = math.prod(shape) // block * block_bytes
        if offset % self.alignment:
            raise self.broken(f"the tensor {name} starts at {offset}, no multiple of the alignment {self.alignment}")
        if start + offset + n_bytes > self.size:
            raise self.broken(
                f"the tensor {name} needs bytes {start + offset} to {start + offset + n_bytes}, the file has "
                f"{self.size}: it is cut short or its header is wrong"
            )
        padding = self._padding(name, shape[-1], block)
        shape = (*shape[:-1], shape[-1] - padding)
        self.tensors[name] = TensorInfo(name, shape, tensor_type, start + offset, n_bytes, padding)

    def _padding(self, name: str, stored: int, block: int) -> int:
        """Number of stored values of each row that do not count."""
        if KEY_ROW_LENGTH + name not in self.metadata:
            return 0
        length = self.metadata[KEY_ROW_LENGTH + name]
        if isinstance(length, bool) or not isinstance(length, int) or not stored - block < length < stored:
            raise self.broken(
                f"the key {KEY_ROW_LENGTH}{name} holds {str(length)[:20]}, expected more than {stored - block} and "
                f"less than {stored}: the rows are stored as {stored} values in blocks of {block}"
            )
        return stored - length
