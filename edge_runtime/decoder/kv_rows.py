"""llama.cpp's saved sequence ↔ rows of keys and values, one per position and layer.

To fill a sequence without computing it in llama.cpp, build `KVRows` and pass them to `append_rows`: the cache on disk
and the prefill on AMX do so. The bytes for `llama_state_seq_set_data` are built here from arrays alone, so their
structure is sound whatever the arrays hold; no bytes of a file get there.

Source: `llama_kv_cache::state_write` of the llama.cpp in llama-cpp-python 0.3.36, little endian:

    magic u32, sequence i32, streams u32 (1), cells u32
    per cell:  position i32, sequences u32 (1), sequence i32
    values are transposed u32, layers u32
    per layer: type of the keys i32, bytes per row u64, keys [cells, row]
    per layer: type of the values i32, then
               bytes per row u64, values [cells, row], or
               bytes per number u32, numbers per row u32, values [numbers, cells] if they are transposed
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

MAGIC = 0xAF143CD8
_HEAD, _SHAPE = struct.Struct("<IiII"), struct.Struct("<II")
_KEYS, _VALUES, _TRANSPOSED = struct.Struct("<iQ"), struct.Struct("<iQ"), struct.Struct("<iII")
_CELL = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])


class UnknownState(ValueError):  # noqa: N818 - handled by computing instead
    """A saved sequence that does not have the form described above."""


@dataclass(frozen=True)
class KVForm:
    """How a context stores a position."""

    layers: int
    key_type: int
    """ggml's number of the type."""
    key_bytes: int
    """Bytes of one position in one layer."""
    value_type: int
    value_bytes: int
    transposed: bool
    """Whether llama.cpp stores the same number of all positions side by side; rows here never do."""
    number_bytes: int = 0
    """Bytes of one value, if they are transposed."""

    @property
    def position_bytes(self) -> int:
        """Bytes of one position in all layers."""
        return self.layers * (self.key_bytes + self.value_bytes)

    def facts(self) -> dict[str, Any]:
        """Fields to write beside the rows."""
        return asdict(self)


@dataclass(frozen=True)
class KVRows:
    """Consecutive positions of one sequence."""

    form: KVForm
    keys: list[Bytes]
    """Per layer: ndarray [shape=(n, key_bytes), uint8]"""
    values: list[Bytes]
    """Per layer: ndarray [shape=(n, value_bytes), uint8]"""

    def __len__(self) -> int:
        return len(self.keys[0])

    def __getitem__(self, part: slice) -> KVRows:
        return KVRows(self.form, [rows[part] for rows in self.keys], [rows[part] for rows in self.values])

    def halves(self, layer: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
        """Keys and values of a layer that are float16: ndarrays [shape=(n, width), uint16]."""
        return self.keys[layer].view(np.uint16), self.values[layer].view(np.uint16)

    def to_bytes(self) -> bytes:
        """All keys, then all values, layer by layer."""
        return b"".join(rows.tobytes() for rows in (*self.keys, *self.values))

    @classmethod
    def from_bytes(cls, form: KVForm, data: Bytes) -> KVRows:
        """Read what `to_bytes` wrote; nothing is copied.

        Parameters
        ----------
        data : ndarray [shape=(n * form.position_bytes,), uint8]
        """
        n = len(data) // form.position_bytes
        if n * form.position_bytes != len(data):
            raise UnknownState(f"{len(data)} bytes are no whole number of positions")
        keys = data[: form.layers * n * form.key_bytes].reshape(form.layers, n, form.key_bytes)
        values = data[keys.size :].reshape(form.layers, n, form.value_bytes)
        return cls(form, [*keys], [*values])

    @classmethod
    def join(cls, parts: Sequence[KVRows]) -> KVRows:
        """Concatenate parts.

        Raises
        ------
        UnknownState
            When they have different forms.
        """
        form = parts[0].form
        if any(part.form != form for part in parts):
            raise UnknownState("the parts were saved by contexts of different kinds")
        if len(parts) == 1:
            return parts[0]
        layers = range(form.layers)
        keys = [np.concatenate([part.keys[layer] for part in parts]) for layer in layers]
        return cls(form, keys, [np.concatenate([part.values[layer] for part in parts]) for layer in layers])


class _Reader:
    def __init__(self, data: Bytes) -> None:
        self.data, self.at = data, 0

    def numbers(self, form: struct.Struct) -> tuple[Any, ...]:
        return form.unpack(self.take(form.size).tobytes())

    def take(self, n_bytes: int) -> Bytes:
        self.at += n_bytes
        if self.at > len(self.data):
            raise UnknownState("it ends too early")
        return self.data[self.at - n_bytes : self.at]


def parse(state: Bytes) -> KVRows:
    """Rows of a sequence that llama.cpp saved, in order of position.

    Parameters
    ----------
    state : ndarray [shape=(n,), uint8] from `llama_state_seq_get_data`; rows are views of it where possible.

    Raises
    ------
    UnknownState
        When it does not have the form described above.
    """
    read = _Reader(state)
    magic, _, n_streams, n = read.numbers(_HEAD)
    if magic != MAGIC or n_streams != 1 or not n:
        raise UnknownState(f"it begins with {magic:#x}, {n_streams} streams and {n} cells")
    cells = read.take(n * _CELL.itemsize).view(_CELL)
    order = np.argsort(cells["position"], kind="stable")
    is_sorted = bool((order == np.arange(n)).all())
    transposed, n_layers = read.numbers(_SHAPE)
    keys, values, kinds = [], [], set()
    for _ in range(n_layers):
        key_type, row = read.numbers(_KEYS)
        rows = read.take(n * row).reshape(n, row)
        keys.append(rows if is_sorted else rows[order])
        kinds.add((key_type, row))
    value_kinds = set()
    for _ in range(n_layers):
        if transposed:
            value_type, size, width = read.numbers(_TRANSPOSED)
            rows = read.take(width * n * size).reshape(width, n, size).swapaxes(0, 1).reshape(n, width * size)
        else:
            (value_type, row), size = read.numbers(_VALUES), 0
            rows = read.take(n * row).reshape(n, row)
        values.append(rows if is_sorted else rows[order])
        value_kinds.add((value_type, rows.shape[1], size))
    if read.at != len(state) or len(kinds) != 1 or len(value_kinds) != 1:
        raise UnknownState(f"layers of {len(kinds)} kinds, {len(state) - read.at} bytes after the last")
    key_type, key_bytes = kinds.pop()
    value_type, value_bytes, size = value_kinds.pop()
    form = KVForm(n_layers, key_type, key_bytes, value_type, value_bytes, bool(transposed), size)
    return KVRows(form, keys, values)


def build(rows: KVRows, first: int) -> Bytes:
    """Saved sequence whose only cells are these rows.

    Parameters
    ----------
    first : position of the first row.

    Returns
    -------
    state : ndarray [shape=(n,), uint8] for `llama_state_seq_set_data`.
    """
    form, n = rows.form, len(rows)
    cells = np.zeros(n, _CELL)
    cells["position"], cells["sequences"] = np.arange(first, first + n), 1
    parts: list[bytes | Bytes] = [
        _HEAD.pack(MAGIC, 0, 1, n), cells.view(np.uint8), _SHAPE.pack(form.transposed, form.layers)
    ]  # fmt: skip
    for keys in rows.keys:
        parts += [_KEYS.pack(form.key_type, form.key_bytes), keys]
    for values in rows.values:
        if form.transposed:
            width = form.value_bytes // form.number_bytes
            parts.append(_TRANSPOSED.pack(form.value_type, form.number_bytes, width))
            parts.append(values.reshape(n, width, form.number_bytes).swapaxes(0, 1))
        else:
            parts += [_VALUES.pack(form.value_type, form.value_bytes), values]
    state = np.empty(sum(len(part) if isinstance(part, bytes) else part.size for part in parts), np.uint8)
    at = 0
    for part in parts:
        raw = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part.reshape(-1)
        state[at : at + len(raw)] = raw
        at += len(raw)
    return state
