"""The GGUF reader: every kind of wrong header is refused with its reason; sound files are read exactly."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf import GGMLQuantizationType as Type
from gguf import quants as gguf_quants

from edge_converters.plan.encode_rows import encode_rows
from edge_runtime.errors import ModelFileError, UnsupportedModelError
from edge_runtime.weights.gguf_file import GGUFFile
from support import gguf_maker as make
from support.gguf_maker import Gguf


def small() -> Gguf:
    """Two keys and two tensors."""
    file = Gguf().key("general.architecture", make.STRING, "test").array("numbers", make.I32, [1, 2, 3])
    return file.tensor("a", (4, 32)).tensor("b", (2, 32), Type.Q8_0)


def changed(**fields: Any) -> Gguf:
    file = small()
    for name, value in fields.items():
        setattr(file, name, value)
    return file


def with_key(kind: int, raw: bytes, name: str = "odd") -> Gguf:
    file = small()
    file.keys[name] = (kind, raw)
    return file


def with_tensor(**fields: Any) -> Gguf:
    file = small()
    for name, value in fields.items():
        setattr(file.tensors["a"], name, value)
    return file


def one_more_key(raw: bytes) -> Gguf:
    return changed(more_keys=raw, n_keys=3)


def one_more_tensor(raw: bytes) -> Gguf:
    return changed(more_tensors=raw, n_tensors=3)


def twice(name: str) -> Gguf:
    return one_more_key(make.text(name) + struct.pack("<IB", make.U8, 1))


HUGE = 2**63
REFUSED: dict[str, tuple[Callable[[], Gguf], str]] = {
    "bad magic": (lambda: changed(magic=b"GGML"), "starts with b'GGML' instead of b'GGUF'"),
    "version 1": (lambda: changed(version=1), "version 1, versions 2 and 3"),
    "version 4": (lambda: changed(version=4), "version 4, versions 2 and 3"),
    "big endian": (lambda: changed(version=0x03000000), "version 50331648"),
    "too many keys": (lambda: changed(n_keys=1000), "announces 2 tensors and 1000 keys in"),
    "absurd key count": (lambda: changed(n_keys=2**64 - 1), "announces"),
    "absurd tensor count": (lambda: changed(n_tensors=HUGE), "announces"),
    "one key too many": (lambda: changed(n_keys=3), "ends inside|unknown type|long"),
    "key twice": (lambda: twice("numbers"), "the key numbers occurs twice"),
    "key name past the end": (lambda: one_more_key(struct.pack("<Q", 60_000)), "it ends inside a key"),
    "key name too long": (lambda: one_more_key(struct.pack("<Q", HUGE)), "a key is 9223372036854775808 bytes long"),
    "key name no UTF-8": (lambda: one_more_key(make.text(b"\xff\xfe")), "a key is not valid UTF-8"),
    "unknown value type": (lambda: with_key(13, b"\0" * 8), "the key odd has the unknown type 13"),
    "largest value type": (lambda: with_key(2**32 - 1, b"\0" * 8), "the key odd has the unknown type 4294967295"),
    "nested array": (
        lambda: with_key(make.ARRAY, struct.pack("<IQ", make.ARRAY, 1) + make.array(make.U8, [1])),
        "element type 9, which is unknown or nested",
    ),
    "string past the end": (
        lambda: with_key(make.STRING, struct.pack("<Q", 1 << 20)),
        "it ends inside the value of odd",
    ),
    "endless string": (
        lambda: with_key(make.STRING, struct.pack("<Q", 2**64 - 1)),
        "it ends inside the value of odd",
    ),
    "string no UTF-8": (lambda: with_key(make.STRING, make.text(b"\xc3\x28")), "value of odd is not valid UTF-8"),
    "array past the end": (
        lambda: with_key(make.ARRAY, struct.pack("<IQ", make.U64, 1 << 20)),
        "inside the array odd",
    ),
    "array of 2^61 numbers": (
        lambda: with_key(make.ARRAY, struct.pack("<IQ", make.U64, 2**61)),
        "inside the array odd",
    ),
    "array of 2^61 strings": (
        lambda: with_key(make.ARRAY, struct.pack("<IQ", make.STRING, 2**61)),
        "announces 2305843009213693952 strings",
    ),
    "array string past the end": (
        lambda: with_key(make.ARRAY, struct.pack("<IQQ", make.STRING, 1, HUGE)),
        "it ends inside the array odd",
    ),
    "array string no UTF-8": (
        lambda: with_key(make.ARRAY, struct.pack("<IQ", make.STRING, 1) + make.text(b"\xff")),
        "an element of the array odd is not valid UTF-8",
    ),
    "alignment 0": (lambda: small().key("general.alignment", make.U32, 0), "its alignment is 0"),
    "alignment 48": (lambda: small().key("general.alignment", make.U32, 48), "its alignment is 48"),
    "alignment 4": (lambda: small().key("general.alignment", make.U32, 4), "its alignment is 4"),
    "alignment 2^31": (lambda: small().key("general.alignment", make.U32, 2**31), "its alignment is 2147483648"),
    "alignment as text": (lambda: small().key("general.alignment", make.STRING, "32"), "its alignment is 32"),
    "alignment as list": (lambda: small().array("general.alignment", make.U32, [32]), "its alignment is"),
    "tensor twice": (
        lambda: one_more_tensor(make.tensor_entry("a", (32, 4), Type.F32, 0)),
        "the tensor a occurs twice",
    ),
    "tensor name of 64 bytes": (lambda: with_tensor(name="n" * 64), "is 64 bytes long, at most 63"),
    "tensor name no UTF-8": (
        lambda: one_more_tensor(make.tensor_entry(b"\xff", (32,), Type.F32, 0)),
        "a tensor name is not valid UTF-8",
    ),
    "0 dimensions": (lambda: with_tensor(dims=()), "the tensor a has 0 dimensions, expected 1 to 4"),
    "5 dimensions": (lambda: with_tensor(dims=(32, 1, 1, 1, 4)), "the tensor a has 5 dimensions"),
    "2^32 - 1 dimensions": (
        lambda: one_more_tensor(make.text("c") + struct.pack("<I", 2**32 - 1)),
        "4294967295 dimensions",
    ),
    "an axis of 0": (lambda: with_tensor(dims=(32, 0)), r"impossible shape \(0, 32\)"),
    "an axis of 2^63": (lambda: with_tensor(dims=(HUGE,)), "impossible shape"),
    "axes whose product is 2^64": (lambda: with_tensor(dims=(2**32, 2**32)), "impossible shape"),
    "axes whose product is 0 modulo 2^64": (lambda: with_tensor(dims=(2**62, 4)), "impossible shape"),
    "rows past the end": (lambda: with_tensor(dims=(32, 5000)), r"the tensor a needs bytes \d+ to \d+"),
    "unknown tensor type": (lambda: with_tensor(type=4), "the tensor a has the unknown type 4"),
    "tensor type 2^32 - 1": (lambda: with_tensor(type=2**32 - 1), "the unknown type 4294967295"),
    "row no multiple of the block": (
        lambda: with_tensor(dims=(33, 1), type=int(Type.Q8_0)),
        "33 values, no multiple of the Q8_0 block of 32",
    ),
    "misaligned offset": (lambda: with_tensor(offset=16), "starts at 16, no multiple of the alignment 32"),
    "offset past the end": (lambda: with_tensor(offset=1 << 20), "the tensor a needs bytes"),
    "offset at the last byte": (lambda: with_tensor(offset=768), "the tensor a needs bytes"),
    "offset that wraps at 2^64": (lambda: with_tensor(offset=2**64 - 32), "the tensor a needs bytes"),
    "control characters in a key": (lambda: with_key(13, b"", "\n\x1b[2J\0"), "the key ��\\[2J� has the unknown"),
    "an endless key": (lambda: with_key(13, b"", "k" * 60_000), "kkkk"),
    "row length of no tensor": (
        lambda: small().key("edge_runtime.row_length.c", make.U32, 31),
        "has the key edge_runtime.row_length.c, but no such tensor",
    ),
    **{
        f"row length {length} of 32": (
            lambda length=length: small().key("edge_runtime.row_length.b", make.I64, length),
            f"row_length.b holds {length}, expected more than 0 and less than 32: the rows are stored as 32",
        )
        for length in (0, -1, 32, 33, 2**62)
    },
    "row length a block too short": (
        lambda: small().tensor("b", (2, 96), Type.Q8_0).key("edge_runtime.row_length.b", make.U32, 64),
        "row_length.b holds 64, expected more than 64 and less than 96",
    ),
    "row length as text": (
        lambda: small().key("edge_runtime.row_length.b", make.STRING, "31"),
        "row_length.b holds 31",
    ),
    "row length as bool": (
        lambda: small().key("edge_runtime.row_length.b", make.BOOL, 1),
        "row_length.b holds True",
    ),
    "row length as fraction": (
        lambda: small().key("edge_runtime.row_length.b", make.F32, 31.0),
        "row_length.b holds 31.0",
    ),
    "row length as list": (lambda: small().array("edge_runtime.row_length.b", make.U32, [31]), "row_length.b holds"),
    "row length of a type without blocks": (
        lambda: small().key("edge_runtime.row_length.a", make.U32, 31),
        "row_length.a holds 31, expected more than 31 and less than 32: .* in blocks of 1",
    ),
    "offset 2^63": (lambda: with_tensor(offset=HUGE), "the tensor a needs bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_header_is_refused_with_its_reason(case: str, tmp_path: Path) -> None:
    maker, reason = REFUSED[case]
    path = maker().write(tmp_path / "broken.gguf")
    with pytest.raises(ModelFileError, match=reason) as refusal:
        GGUFFile(path)
    message = str(refusal.value)
    assert "broken.gguf" in message
    assert re.search(r"download|convert", message), "the message does not say what to do"
    assert len(message) < 400
    assert "\n" not in message


def test_the_unchanged_file_is_sound(tmp_path: Path) -> None:
    """Without this, the refusals above might all have another cause."""
    file = GGUFFile(small().write(tmp_path / "good.gguf"))
    assert list(file.tensors) == ["a", "b"]
    assert file.metadata["general.architecture"] == "test"


def test_every_shorter_file_is_refused(tmp_path: Path) -> None:
    """Only the padding after the last tensor may be missing; some writers omit it."""
    whole = small().build()
    n_padding = -len(small().tensors["b"].data) % 32
    for length in range(len(whole) + 1):
        path = tmp_path / f"{length}.gguf"
        path.write_bytes(whole[:length])
        if length >= len(whole) - n_padding:
            assert GGUFFile(path).array("b").shape == (2, 32)
            continue
        with pytest.raises(ModelFileError):
            GGUFFile(path)


@pytest.mark.parametrize(
    "name, reason",
    [("absent.gguf", "does not exist"), (".", "is a folder"), ("a\0b", "null byte"), ("n" * 5000, "too long")],
)
def test_a_path_that_is_not_a_file_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=reason):
        GGUFFile(f"{tmp_path}/{name}")


SCALARS = {
    "u8": ("add_uint8", 255),
    "i8": ("add_int8", -128),
    "u16": ("add_uint16", 65535),
    "i16": ("add_int16", -32768),
    "u32": ("add_uint32", 2**32 - 1),
    "i32": ("add_int32", -(2**31)),
    "u64": ("add_uint64", 2**64 - 1),
    "i64": ("add_int64", -(2**63)),
    "f32": ("add_float32", 0.15625),
    "f64": ("add_float64", 1 / 3),
    "true": ("add_bool", True),
    "false": ("add_bool", False),
    "text": ("add_string", "Grüße 図\n\0"),
}
ARRAYS = {"ints": [1, -2, 3], "floats": [0.5, -0.25], "strings": ["a", "", "図"], "bools": [True, False]}


def test_every_kind_of_value_comes_back_as_gguf_py_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "values.gguf"
    writer = GGUFWriter(path, "test")
    for key, (method, value) in SCALARS.items():
        getattr(writer, method)(key, value)
    for key, values in ARRAYS.items():
        writer.add_array(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = GGUFFile(path).metadata
    for key, (_, value) in SCALARS.items():
        assert metadata[key] == value, key
        assert type(metadata[key]) is type(value), key
    for key, values in ARRAYS.items():
        assert list(metadata[key]) == values, key


@pytest.mark.parametrize("kind", [k for k in make.CODES if k != make.BOOL])
def test_arrays_of_every_number_keep_their_values(kind: int, tmp_path: Path) -> None:
    values = [0, 1, 100]
    file = GGUFFile(Gguf().array("numbers", kind, values).write(tmp_path / "array.gguf"))
    array = file.metadata["numbers"]
    assert array.tolist() == values
    assert array.dtype.itemsize == struct.calcsize(make.CODES[kind])


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_alignment_is_kept(alignment: int, tmp_path: Path) -> None:
    file = small().key("general.alignment", make.U32, alignment)
    file.alignment = alignment
    read = GGUFFile(file.write(tmp_path / "aligned.gguf"))
    for name in ("a", "b"):
        assert read.tensors[name].offset % alignment == 0
        assert read.blocks(name).tobytes() == file.tensors[name].data


@pytest.mark.parametrize("version", [2, 3])
def test_versions_2_and_3_are_read(version: int, tmp_path: Path) -> None:
    assert GGUFFile(changed(version=version).write(tmp_path / "v.gguf")).tensor("a", (4, 32)).n_rows == 4


TYPES = [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_K, Type.Q6_K]


@pytest.mark.parametrize("kind", TYPES)
def test_tensors_are_dequantised_as_gguf_py_does(kind: Type, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)
    blocks = encode_rows(values, kind)
    file = Gguf()
    file.tensors["w"] = make.Tensor("w", (512, 3, 2), int(kind), blocks.tobytes())
    read = GGUFFile(file.write(tmp_path / "w.gguf"))
    expected = gguf_quants.dequantize(blocks, kind)
    whole = read.array("w")
    assert whole.shape == (2, 3, 512)
    assert whole.dtype == np.float32
    assert np.array_equal(whole.reshape(6, 512), expected)
    assert np.abs(whole.reshape(6, 512) - values).max() < 0.6, "these are not the values that were written"
    for index in (np.array([5, 0, 0, 3]), np.array([], np.int64), slice(1, 4), np.array([2])):
        assert np.array_equal(read.rows("w", index), expected[index])
    assert np.array_equal(read.blocks("w"), blocks)


def test_every_float16_is_read_exactly(tmp_path: Path) -> None:
    """All 65,536 of them, in one piece and in pieces, infinities and NaN included."""
    halves = np.arange(1 << 16, dtype=np.uint16).reshape(64, 1024)
    file = Gguf()
    file.tensors["w"] = make.Tensor("w", (1024, 64), int(Type.F16), halves.tobytes())
    read, expected = GGUFFile(file.write(tmp_path / "w.gguf")), halves.view(np.float16).astype(np.float32)
    for index in (slice(None), slice(0, 31), slice(31, 33), np.array([63, 0])):
        np.testing.assert_array_equal(read.rows("w", index), expected[index])
    assert np.isinf(expected).sum() == 2
    assert np.array_equal(np.signbit(read.array("w")[:31]), np.signbit(expected[:31])), "zeros have a sign too"


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (3, 32), (70_000, 32), (7, 4320), (2, 131_104)])
def test_blocks_of_any_bytes_are_read_as_gguf_py_does(kind: Type, rows: int, columns: int, tmp_path: Path) -> None:
    """Random scales: subnormal, infinite, NaN, negative; sizes around those of a chunk, or below one."""
    n_bytes = rows * columns // 32 * GGML_QUANT_SIZES[kind][1]
    file, raw = Gguf(), np.random.default_rng(rows).integers(0, 256, n_bytes, np.uint8)
    file.tensors["w"] = make.Tensor("w", (columns, rows), int(kind), raw.tobytes())
    values = GGUFFile(file.write(tmp_path / "w.gguf")).array("w")
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(values, gguf_quants.dequantize(raw.reshape(rows, -1), kind))


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0])
def test_parts_are_views_that_multiply_to_the_values(kind: Type, tmp_path: Path) -> None:
    read = GGUFFile(Gguf().tensor("w", (6, 96), kind).write(tmp_path / "w.gguf"))
    scales, integers = read.parts("w")
    assert (scales.shape, scales.dtype, integers.shape[:2]) == ((6, 3), np.float16, (6, 3))
    assert np.shares_memory(scales, read.blocks("w"))
    assert np.shares_memory(integers, read.blocks("w"))
    if kind == Type.Q4_0:
        assert integers.dtype == np.uint8
        integers = np.concatenate([integers & 15, integers >> 4], axis=-1).astype(np.int8) - np.int8(8)
    assert integers.dtype == np.int8
    assert np.array_equal((scales.astype(np.float32)[:, :, None] * integers).reshape(6, 96), read.array("w"))


def test_other_types_have_no_parts(tmp_path: Path) -> None:
    read = GGUFFile(Gguf().tensor("w", (6, 96), Type.F16).write(tmp_path / "w.gguf"))
    with pytest.raises(UnsupportedModelError, match="the tensor w is stored as F16, expected Q8_0 or Q4_0"):
        read.parts("w")


# --- padded rows -----------------------------------------------------------------------------------------------


def padded(kind: Type, tail: float = 0.0) -> Gguf:
    """A tensor of 4 rows of 40 values that are stored as 64, and one that is not padded."""
    values = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    values[:, 40:] = 0
    values[2, 63] = tail
    file = Gguf().tensor("plain", (4, 64), kind)
    file.tensors["w"] = make.Tensor("w", (64, 4), int(kind), encode_rows(values, kind).tobytes())
    return file.key("edge_runtime.row_length.w", make.U32, 40)


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0])
def test_padded_rows_end_where_the_file_says(kind: Type, tmp_path: Path) -> None:
    read = GGUFFile(padded(kind).write(tmp_path / "w.gguf"))
    info, stored = read.tensor("w", (4, 40)), read.blocks("w")
    expected = gguf_quants.dequantize(stored, kind)
    assert expected.shape == (4, 64)
    assert (info.padding, info.n_elements, info.n_bytes) == (24, 160, stored.size)
    assert read.tensors["plain"].shape == (4, 64)
    assert np.array_equal(read.array("w"), expected[:, :40])
    assert read.array("w").flags.c_contiguous
    assert np.array_equal(read.rows("w", np.array([3, 1])), expected[[3, 1], :40])
    assert read.rows("w", np.array([], np.int64)).shape == (0, 40)
    assert read.parts("w").scales.shape == (4, 2)


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0])
@pytest.mark.parametrize("tail", [1.0, -0.5, np.inf, np.nan])
def test_padding_that_is_not_zero_is_refused(kind: Type, tail: float, tmp_path: Path) -> None:
    """Zero is exact in every block type, so nothing else may be there."""
    file = padded(kind, tail if np.isfinite(tail) else 1.0)
    if not np.isfinite(tail):
        raw, row_bytes = bytearray(file.tensors["w"].data), len(file.tensors["w"].data) // 4
        start = 2 * row_bytes + row_bytes // 2  # the scale of the third row's last block
        raw[start : start + 2] = np.float16(tail).tobytes()
        file.tensors["w"].data = bytes(raw)
    read = GGUFFile(file.write(tmp_path / "w.gguf"))
    assert read.rows("w", np.array([0, 1, 3])).shape == (3, 40), "the other rows are sound"
    for ask in (lambda: read.array("w"), lambda: read.rows("w", slice(2, 3)), lambda: read.parts("w")):
        with pytest.raises(
            ModelFileError, match=r"w.gguf: rows of w hold more after their 40 values, expected zeros"
        ):
            ask()


def test_a_type_without_dequantiser_is_refused_when_it_is_read(tmp_path: Path) -> None:
    file = with_tensor(type=int(Type.I32))
    read = GGUFFile(file.write(tmp_path / "i32.gguf"))
    with pytest.raises(UnsupportedModelError, match="the tensor a is stored as I32"):
        read.array("a")


def test_lookups_say_what_is_wrong(tmp_path: Path) -> None:
    file = GGUFFile(small().key("size", make.U32, 7).key("flag", make.BOOL, 1).write(tmp_path / "m.gguf"))
    assert file.get("size", int) == 7
    assert file.get("size", float) == 7.0
    assert file.get("absent", int, 5) == 5
    for ask, reason in (
        (lambda: file.get("absent", int), "the key absent is missing"),
        (lambda: file.get("size", str), "the key size holds a whole number, '7', expected text"),
        (lambda: file.get("flag", int), "holds true or false, 'True', expected a whole number"),
        (lambda: file.strings("numbers"), "expected a list of strings"),
        (lambda: file.tensor("absent"), "the tensor absent is missing"),
        (lambda: file.tensor("a", (32, 4)), r"the tensor a has shape \(4, 32\), expected \(32, 4\)"),
    ):
        with pytest.raises(ModelFileError, match=reason):
            ask()


def test_the_file_is_not_copied_into_memory(tmp_path: Path) -> None:
    """A sparse file of 3 GB: reading one row of it is immediate, reading it whole would not be."""
    file = Gguf()
    file.tensors["w"] = make.Tensor("w", (1024, 786_432), int(Type.F32), b"")
    header = file.header()
    path = tmp_path / "large.gguf"
    with path.open("wb") as out:
        out.write(header)
        out.truncate(make.padded(len(header), 32) + 4096 * 786_432)
    read = GGUFFile(path)
    assert read.size_bytes > 3e9
    assert not read.rows("w", np.array([786_431])).any()
