"""Importance matrices: computed here, against the model's definition; read from files; and what is refused.

That files quantised with one equal llama-quantize's, and that ours equals llama-imatrix's, is in
`test_reference_tools.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFWriter
from PIL import Image

from checkpoint_copies import CheckpointCopy
from edge_converters import convert_checkpoint
from edge_converters.calibration.importance import read_importance
from edge_converters.calibration.importance_from_pictures import observe, prompts
from edge_converters.convert import Converted
from edge_runtime.cli.program import main
from edge_runtime.errors import CheckpointError
from edge_runtime.weights.gguf_file import GGUFFile
from naive import NaiveModel

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


N_PROMPTS = 7  # two pictures, a text in four pieces, a short text


class Watched:
    """A matrix that keeps what it is multiplied by."""

    __array_ufunc__ = None  # lets NumPy hand `x @ watched` over

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.seen = values, []

    @property
    def T(self) -> Watched:  # noqa: N802 - NumPy's name
        return self

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        self.seen.append(x)
        return x @ self.values.T


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures, two texts, and things that are neither."""
    folder, rng = tmp_path_factory.mktemp("calibration"), np.random.default_rng(3)
    for number in range(2):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        coarse.resize((300 + 400 * number, 240), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "a.txt").write_text("The quick brown fox jumps over the lazy dog. 那只敏捷的狐狸。\n" * 60)
    (folder / "b.md").write_bytes(b"\xff some *text* with a byte that is none")
    (folder / "table.csv").write_text("1,2")
    return folder


@pytest.mark.slow
def test_an_importance_matrix_equals_the_definition(exact_folder: Path, checkpoint: Path, folder: Path) -> None:
    """Mean squares of every input of every matrix, in double precision."""
    decoder, mmproj = exact_folder / "ggml-model-F32.gguf", exact_folder / "mmproj-model-f32.gguf"
    found = observe(decoder, mmproj, folder, lambda what, done, total: None)
    streams = list(prompts(GGUFFile(decoder), mmproj, folder))
    assert len(streams) == found.n_chunks == N_PROMPTS
    copy = CheckpointCopy.of(checkpoint)
    naive = NaiveModel(copy.config, {name: tensor.values for name, tensor in copy.tensors.items()})
    watched = {}
    for n in range(3):
        for theirs, ours in NAMES.items():
            name = f"llm.model.layers.{n}.{theirs}.weight"
            watched[f"blk.{n}.{ours}.weight"] = naive.w[name] = Watched(naive.w[name])  # type: ignore[assignment]
    for stream in streams:
        naive.logits(stream)
    assert set(found.squares) == set(watched)
    for name, matrix in watched.items():
        seen = np.concatenate(matrix.seen)
        assert len(seen) == sum(map(len, streams))
        expected = np.square(seen).mean(axis=0)
        # flash attention and float16 keys and values: 2^-11 of an element, squared and averaged
        np.testing.assert_allclose(
            found.squares[name], expected, rtol=0.02, atol=1e-4 * expected.mean(), err_msg=name
        )


@pytest.mark.slow
def test_calibration_fits_the_decoders_types_too(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    """Other scales than without, less error where the model looks, and a word about it in the file."""
    plain = convert_checkpoint(checkpoint, tmp_path / "plain").decoder
    result = CliRunner().invoke(
        main, ["convert", str(checkpoint), "-o", str(tmp_path / "c"), "--calibrate", str(folder)]
    )
    assert result.exit_code == 0, result.output
    calibrated = tmp_path / "c" / plain.name
    one, other = GGUFFile(plain), GGUFFile(calibrated)
    facts = [other.metadata[f"quantize.imatrix.{name}"] for name in ("file", "entries_count", "chunks_count")]
    assert facts == [folder.name, 21, N_PROMPTS]
    f32 = convert_checkpoint(checkpoint, tmp_path / "f32", decoder_type="f32", vision_type="f32")
    squares = observe(f32.decoder, f32.mmproj, folder, lambda *_: None).squares
    gains = []
    for name, weights in squares.items():
        exact = GGUFFile(f32.decoder).array(name)
        before, after = (np.sqrt(np.mean(weights * (file.array(name) - exact) ** 2)) for file in (one, other))
        gains.append(after / before)
    assert np.mean(gains) < 0.99, gains
    assert max(gains) < 1.01, gains


def test_types_without_a_search_need_no_matrix(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    stages = set()
    convert_checkpoint(
        checkpoint, tmp_path, decoder_type="q8_0", pictures=folder, progress=lambda what, *_: stages.add(what)
    )
    assert stages == {"vision", "calibrate", "decoder"}


# --- files ----------------------------------------------------------------------------------------------------


def matrix_file(path: Path, squares: dict[str, np.ndarray], count: float = 4.0, **keys: Any) -> Path:
    """A matrix as llama-imatrix writes it."""
    writer = GGUFWriter(path, "unused")
    writer.add_array("imatrix.datasets", keys.get("datasets", ["text.txt"]))
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in squares.items():
        writer.add_tensor(f"{name}.in_sum2", values.astype(np.float32).reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.full((keys.get("n_counts", 1), 1), count, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def legacy_file(path: Path, squares: dict[str, np.ndarray], n_calls: int = 4) -> Path:
    data = struct.pack("<i", len(squares))
    for name, values in squares.items():
        text = name.encode()
        data += struct.pack("<i", len(text)) + text + struct.pack("<2i", n_calls, len(values))
        data += values.astype("<f4").tobytes()
    path.write_bytes(data + struct.pack("<2i", 3, 8) + b"text.txt")
    return path


@pytest.mark.parametrize("write", [matrix_file, legacy_file])
def test_both_formats_are_read(tmp_path: Path, write: Callable[..., Path]) -> None:
    values = np.linspace(0, 8, 256)
    found = read_importance(write(tmp_path / "m", {"blk.0.attn_q.weight": values}))
    np.testing.assert_array_equal(found.squares["blk.0.attn_q.weight"], (values / 4).astype(np.float32))
    assert (found.name, found.dataset, found.n_chunks) == ("m", "text.txt", 3)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 256])
def test_names_of_any_length_are_read_whole(tmp_path: Path, length: int) -> None:
    """Of tensors that the decoder does not have; those it has follow, and lie where they should."""
    long, short = ("blk.0." + "x" * length)[-length:], "blk.0.attn_q.weight"
    values = np.linspace(0, 8, 256)
    found = read_importance(legacy_file(tmp_path / "m", {long: values, short: values + 1}))
    assert [*found.squares] == [long, short]
    np.testing.assert_array_equal(found.squares[short], ((values + 1) / 4).astype(np.float32))


@pytest.mark.parametrize("length", [257, 1 << 30, 0, -1])
def test_names_that_are_none_are_refused(tmp_path: Path, length: int) -> None:
    """Their length would be taken on trust, and what follows for numbers."""
    path = legacy_file(tmp_path / "m", {"x" * 300: np.ones(256)})
    data = bytearray(path.read_bytes())
    if length != 257:
        data[4:8] = struct.pack("<i", length)
    else:
        data = bytearray(legacy_file(path, {"x" * length: np.ones(256)}).read_bytes())
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is no importance matrix; expected a file of llama-imatrix"):
        read_importance(path)


def test_a_matrix_changes_what_it_weighs(
    checkpoint: Path, converted: Callable[[str, str], Converted], tmp_path: Path
) -> None:
    """A column that counts a thousand times more than the others comes out nearly exact; other tensors stay."""
    weights = np.ones(256)
    weights[17] = 1e4
    path = matrix_file(tmp_path / "m.gguf", {"blk.1.ffn_gate.weight": weights})
    file = GGUFFile(convert_checkpoint(checkpoint, tmp_path / "out", imatrix=path).decoder)
    plain, exact = (GGUFFile(converted(kind, "f32").decoder) for kind in ("q4_k_m", "f32"))
    errors = [
        np.abs((f.array("blk.1.ffn_gate.weight") - exact.array("blk.1.ffn_gate.weight"))[:, 17]).mean()
        for f in (file, plain)
    ]
    assert errors[0] < 0.5 * errors[1]
    np.testing.assert_array_equal(file.blocks("blk.1.ffn_up.weight"), plain.blocks("blk.1.ffn_up.weight"))


def test_a_matrix_weighs_single_tensors_of_few_bits_in_plain_types(checkpoint: Path, tmp_path: Path) -> None:
    """They are encoded here then, to the bytes that llama.cpp makes in a mix; without any, the user is told."""
    name, weights = "blk.1.ffn_gate.weight", np.random.default_rng(0).uniform(0.01, 9, 256)
    path = matrix_file(tmp_path / "m.gguf", {name: weights})
    plain = convert_checkpoint(checkpoint, tmp_path / "q8_0", decoder_type="q8_0", imatrix=path)
    assert any("m.gguf changes nothing" in note for note in plain.notes)
    blocks = []
    for kind in ("q8_0", "q4_k_s"):
        files = convert_checkpoint(
            checkpoint, tmp_path / f"{kind}-4", decoder_type=kind, imatrix=path, tensor_types=[f"{name}=q4_k"]
        )
        assert files.notes == ()
        blocks.append(GGUFFile(files.decoder).blocks(name))
    np.testing.assert_array_equal(*blocks)


def refuse(checkpoint: Path, folder: Path, path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        convert_checkpoint(checkpoint, folder / "out", imatrix=path)
    assert str(caught.value).endswith(".")
    assert not (folder / "out").exists()


def test_matrices_that_do_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    name, ones = "blk.0.attn_q.weight", np.ones(256)
    refuse(checkpoint, tmp_path, tmp_path / "nowhere", "cannot be read: No such file")
    refuse(checkpoint, tmp_path, matrix_file(tmp_path / "a", {name: np.ones(128)}), "has 128 values for blk.0.attn_q")
    refuse(
        checkpoint, tmp_path, matrix_file(tmp_path / "b", {"blk.99.attn_q.weight": ones}), "knows none of the decoder"
    )
    refuse(checkpoint, tmp_path, matrix_file(tmp_path / "c", {name: -ones}), "no mean squares")
    refuse(checkpoint, tmp_path, matrix_file(tmp_path / "d", {name: ones * np.nan}), "no mean squares")
    refuse(checkpoint, tmp_path, matrix_file(tmp_path / "e", {name: ones}, n_counts=3), "3 counts, expected one")
    refuse(checkpoint, tmp_path, matrix_file(tmp_path / "f", {}), "no importance matrix|holds no .in_sum2")
    decoder = convert_checkpoint(checkpoint, tmp_path / "model", decoder_type="f32").decoder
    refuse(checkpoint, tmp_path, decoder, "is no importance matrix")
    (tmp_path / "text").write_text("no matrix at all, but some text that is long enough")
    refuse(checkpoint, tmp_path, tmp_path / "text", "is no importance matrix; expected a file of llama-imatrix")
    whole = legacy_file(tmp_path / "g", {name: ones, "blk.0.attn_k.weight": ones}).read_bytes()
    for cut in (3, 4, 8, 20, 40, 600, 1100):
        (tmp_path / "h").write_bytes(whole[:cut])
        refuse(checkpoint, tmp_path, tmp_path / "h", "is no importance matrix")


def test_a_folder_of_neither_pictures_nor_texts(exact_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2")
    decoder, mmproj = exact_folder / "ggml-model-F32.gguf", exact_folder / "mmproj-model-f32.gguf"
    with pytest.raises(CheckpointError, match="holds no picture and no text"):
        observe(decoder, mmproj, tmp_path, lambda *_: None)
