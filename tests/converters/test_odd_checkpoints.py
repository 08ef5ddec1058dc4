"""Checkpoints that contradict themselves, or would take for ever: refused before a byte is written, never a crash."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint_copies import CheckpointCopy
from edge_converters import convert_checkpoint
from edge_converters.calibration.importance import read_importance
from edge_converters.sources.safetensors import read_index
from edge_runtime.errors import CheckpointError

ODD = [-1, 0, 10**12, 10**400, float("inf"), float("nan"), 4.5, "x", True, [], None]
KEYS = (
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_size",
    "query_num",
    "max_position_embeddings",
)
NUMBERS = ("rms_norm_eps", "rope_theta")
MAX_S = 10.0


def refused(source: Path, folder: Path, match: str) -> None:
    """Expect one sentence, soon, and nothing written."""
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=match) as caught:
        convert_checkpoint(source, folder, decoder_type="f16", vision_type="f16")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    assert not folder.exists() or not [*folder.iterdir()]
    assert time.perf_counter() - started < MAX_S


@pytest.mark.parametrize("key", KEYS)
def test_odd_sizes(copy: CheckpointCopy, tmp_path: Path, key: str) -> None:
    source = copy.write(tmp_path / "source")
    for value in ODD:
        (source / "config.json").write_text(json.dumps({**copy.config, key: value}))
        refused(source, tmp_path / "out", "expected a (whole )?number|digits")


@pytest.mark.parametrize("key", NUMBERS)
def test_odd_numbers(copy: CheckpointCopy, tmp_path: Path, key: str) -> None:
    source = copy.write(tmp_path / "source")
    for value in (-1, 0, 10**400, float("inf"), float("nan"), "x", True, []):
        (source / "config.json").write_text(json.dumps({**copy.config, key: value}))
        refused(source, tmp_path / "out", "expected a number|digits")


def in_preprocessor(key: str, value: Any) -> Callable[[CheckpointCopy], None]:
    return lambda copy: copy.files["preprocessor_config.json"].update({key: value})


def without_bpe_files(change: Callable[[Any], None]) -> Callable[[CheckpointCopy], None]:
    """Change tokenizer.json, and leave it alone as tokenizer."""

    def changed(copy: CheckpointCopy) -> None:
        del copy.files["vocab.json"], copy.files["merges.txt"]
        change(copy.files["tokenizer.json"]["model"])

    return changed


def with_merge(line: str) -> Callable[[CheckpointCopy], None]:
    return lambda copy: copy.files.update({"merges.txt": copy.files["merges.txt"] + f"\n{line}\n".encode()})


def in_vocabulary(text: str, number: Any) -> Callable[[CheckpointCopy], None]:
    return lambda copy: copy.files["vocab.json"].update({text: number})


CHANGES: dict[str, tuple[Callable[[CheckpointCopy], None], str]] = {
    "enormous slices": (in_preprocessor("max_slice_nums", 10**12), "expected a positive whole number"),
    "true slices": (in_preprocessor("scale_resolution", True), "expected a positive whole number"),
    "infinite mean": (in_preprocessor("norm_mean", [1e999, 0, 0]), "expected three numbers"),
    "no deviation": (in_preprocessor("norm_std", [0.5, 0, 0.5]), "expected three numbers"),
    "half a character": (lambda c: c.config.update({"_name_or_path": "a\ud800"}), "config.json is not readable JSON"),
    "half a token": (in_vocabulary("\ud800", 5), "vocab.json is not readable JSON"),
    "an infinite id": (in_vocabulary("a", 1e999), "no whole number as id"),
    "a broken id": (in_vocabulary("a", 4.5), "no whole number as id"),
    "an id for two": (in_vocabulary("another", 5), "one id for several tokens"),
    "a merge of one": (with_merge("abc"), "has the merge 'abc', expected two tokens"),
    "a merge of three": (with_merge("a b c"), "has the merge 'a b c', expected two tokens"),
    "a merge of nothing": (with_merge(" "), "has the merge ' ', expected two tokens"),
    "an unknown merge": (with_merge("a zzz"), "has the merge 'a zzz', expected two tokens"),
    "a long merge": (with_merge("a" * 10**6 + " b"), "has the merge 'aaa"),
    "merges of three": (without_bpe_files(lambda m: m.update(merges=[["a", "b", "c"]])), "has the merge 'a b c'"),
    "merges of numbers": (without_bpe_files(lambda m: m.update(merges=[[1, 2]])), "usual form"),
    "merges that are none": (without_bpe_files(lambda m: m.update(merges=3)), "usual form"),
    "a vocabulary that is none": (without_bpe_files(lambda m: m.update(vocab=[1])), "usual form"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_odd_files(copy: CheckpointCopy, tmp_path: Path, name: str) -> None:
    change, match = CHANGES[name]
    change(copy)
    refused(copy.write(tmp_path / "source"), tmp_path / "out", match)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("kind", ["pipe", "endless", "huge"])
def test_files_without_an_end(
    copy: CheckpointCopy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    """Links and pipes in a folder of somebody else's, which an archive may hold."""
    source = copy.write(tmp_path / "source")
    (source / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(source / name)
    elif kind == "endless":
        (source / name).symlink_to("/dev/zero")
    else:
        monkeypatch.setattr("edge_converters.sources.checkpoint.MAX_TEXT_BYTES", 1 << 20)
        (source / name).write_bytes(b" " * (1 << 21))
    refused(
        source, tmp_path / "out", rf"{name} is not readable text \(it (is not a file|has more than 1048576 bytes)\)"
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_lora_without_an_end(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"it is no file|it is not a file|has no adapter_model|is no"):
        convert_checkpoint(checkpoint, tmp_path / "out", lora=tmp_path)


def shard(path: Path, entries: dict[str, list[int]], n_bytes: int = 64) -> Path:
    header = json.dumps(
        {
            name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
            for name, (begin, end) in entries.items()
        }
    ).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(n_bytes))
    return path


@pytest.mark.parametrize(
    "entries",
    [
        {"a": [0, 8], "b": [4, 12]},
        {"a": [0, 8], "b": [0, 8]},
        {"a": [0, 64], "b": [10, 11]},
        {"a": [8, 16], "b": [0, 9]},
    ],
)
def test_tensors_that_share_bytes(tmp_path: Path, entries: dict[str, list[int]]) -> None:
    with pytest.raises(CheckpointError, match=r"[ab] and [ab] share bytes; download it again"):
        read_index([shard(tmp_path / "x.safetensors", entries)])


def test_tensors_side_by_side_and_empty_ones(tmp_path: Path) -> None:
    found = read_index([shard(tmp_path / "x.safetensors", {"b": [8, 16], "a": [0, 8], "c": [4, 4], "d": [16, 64]})])
    assert sorted(found) == ["a", "b", "c", "d"]


def test_a_name_that_occurs_twice(tmp_path: Path) -> None:
    entry = b'{"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}'
    header = b'{"a": ' + entry + b', "a": ' + entry.replace(b"0, 8", b"8, 16") + b"}"
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(CheckpointError, match="has a name twice"):
        read_index([path])


def legacy(*entries: tuple[bytes, int, int], extra: bytes = b"") -> bytes:
    """An importance matrix of the older form: (name, calls, values) each."""
    parts = [struct.pack("<i", len(entries))]
    for name, calls, n in entries:
        parts += [
            struct.pack("<i", len(name)),
            name,
            struct.pack("<2i", calls, n),
            np.ones(max(n, 0), "<f4").tobytes(),
        ]
    return b"".join(parts) + extra


@pytest.mark.parametrize(
    "data",
    [
        legacy((b"a", -1, 4)),
        legacy((b"a", 1, 4), (b"a", 1, 4)),
        legacy((b"a", 1, -4)),
        legacy((b"a", 1, 4))[:-2],
        legacy((b"", 1, 4)),
        struct.pack("<i", 2**31 - 1) + bytes(100),
        struct.pack("<3i", 1, 2**31 - 1, 0),
        struct.pack("<2i", 1, 1) + b"a" + struct.pack("<2i", 1, 2**31 - 1),
        legacy((b"\xff", 1, 4)),
        b"",
    ],
)
def test_odd_importance_matrices(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.dat"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is no importance matrix"):
        read_importance(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_an_importance_matrix_without_an_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(CheckpointError, match=r"is no file; check the path|cannot be read"):
            read_importance(path)
