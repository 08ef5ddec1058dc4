"""Conversions that are killed or meet a full disk, and checkpoints whose headers lie."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from checkpoint_copies import CheckpointCopy
from edge_converters import convert_checkpoint
from edge_converters.sources.safetensors import StoredTensor, read_index
from edge_runtime.errors import CheckpointError, ModelFileError
from edge_runtime.store.find import find_model

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "converters"))}

# --- killed ---------------------------------------------------------------------------------------------------

ENDLESS = """
import sys
from edge_converters import convert_checkpoint
while True:
    convert_checkpoint(sys.argv[1], sys.argv[2], force=True)
    print("done", flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_a_conversion_leaves_whole_files_alone(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever has a final name is complete, byte for byte, while one conversion after another replaces it."""
    whole = convert_checkpoint(checkpoint, tmp_path / "whole")
    expected = {path.name: path.read_bytes() for path in (whole.decoder, whole.mmproj)}
    rng, seen = random.Random(0), 0
    command = [sys.executable, "-c", ENDLESS, str(checkpoint)]
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        with subprocess.Popen([*command, str(folder)], stdout=subprocess.PIPE, env=ENVIRONMENT) as child:
            assert child.stdout is not None
            if number % 2:  # else the first conversion is hit, or the imports before it
                assert child.stdout.readline() == b"done\n"
            time.sleep(rng.uniform(0, 1.5))
            child.kill()
        visible = {path.name: path for path in folder.iterdir() if not path.name.startswith(".")}
        for name, path in visible.items():
            assert path.read_bytes() == expected[name], f"kill {number}: {name} is not whole"
        if set(visible) == set(expected):
            assert find_model(folder).decoder.name == whole.decoder.name
        else:
            with pytest.raises(ModelFileError):
                find_model(folder)
        seen += len(visible)
        convert_checkpoint(checkpoint, folder, force=True)  # what was left is no hindrance
        assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == set(expected)
    assert seen >= 12


# --- full -----------------------------------------------------------------------------------------------------


def on_a_small_disk(mount: Path, megabytes: float, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run edge-runtime where a folder is a disk of some megabytes; then list what lies on it."""
    script = (
        f"mount -t tmpfs -o size={int(megabytes * 1024)}k tmpfs {mount} && "
        f'{{ "$@"; code=$?; ls -A {mount} | sed "s/^/left: /"; exit $code; }}'
    )
    command = [
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        script,
        "sh",
        sys.executable,
        "-m",
        "edge_runtime",
    ]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False)


def can_mount(tmp_path: Path) -> bool:
    try:
        return on_a_small_disk(tmp_path, 1, "--version").returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("megabytes", [0.5, 1.5, 4.0, 6.5, 7.0, 7.5, 8.0])
@pytest.mark.parametrize("decoder_type", ["q4_k_m", "f16"])
def test_a_full_disk_is_one_sentence(checkpoint: Path, tmp_path: Path, megabytes: float, decoder_type: str) -> None:
    """A real one: full at once, in the middle of either file, or as llama.cpp quantizes; or just large enough."""
    if not can_mount(tmp_path):
        pytest.skip("this system lets nobody mount a small disk")
    arguments = ("convert", str(checkpoint), "-o", str(tmp_path), "--type", decoder_type)
    done = on_a_small_disk(tmp_path, megabytes, *arguments)
    if done.returncode == 0:
        assert megabytes > 6
        assert done.stdout.count("left: ") == 2
        return
    assert done.returncode == 1
    assert done.stdout == "", "something is left on the disk"
    assert done.stderr.startswith("edge-runtime: ")
    assert done.stderr.count("\n") == 1
    assert "free some space" in done.stderr


# --- headers that lie -----------------------------------------------------------------------------------------

SIZES = [
    -1,
    0,
    1,
    2,
    255,
    1 << 31,
    1 << 32,
    1 << 59,
    1 << 60,
    1 << 63,
    1 << 64,
    10**400,
    1.5,
    True,
    None,
    "2",
    [2],
    {},
]


def write(path: Path, header: bytes, n_bytes: int = 64) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(n_bytes))
    return path


def read(path: Path) -> tuple[list[StoredTensor], str]:
    """Tensors of a file and no word, or none and what is wrong."""
    try:
        return list(read_index([path]).values()), ""
    except CheckpointError as error:
        return [], str(error)


def random_header(rng: random.Random) -> bytes:
    """JSON of the right form with odd things in it."""
    entries: dict[str, Any] = {}
    for n in range(rng.randrange(1, 4)):
        size = rng.choice([1, 2, 4])
        entry: dict[str, Any] = {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}
        for _ in range(rng.choice([0, 1, 1, 2])):
            match rng.randrange(5):
                case 0:
                    entry["shape"] = rng.choices(SIZES, k=rng.choice([0, 1, 2, 9, 5000]))
                case 1:
                    entry["data_offsets"] = rng.choices(SIZES, k=rng.choice([0, 1, 2, 2, 2, 3]))
                case 2:
                    entry["dtype"] = rng.choice(["F64", "BF16", "U8", "", None, 3, ["F32"], "F32" * 1000])
                case 3:
                    entry.pop(rng.choice(["dtype", "shape", "data_offsets"]), None)
                case 4:
                    entry = rng.choice([[], {}, 3, None, "x", [entry]])  # type: ignore[assignment]
            if not isinstance(entry, dict):
                break
        entries[rng.choice([f"t{n}", "", "\x1b[31m", "é" * 50, "__metadata__"])] = entry
    return json.dumps(entries).encode()


def test_headers_made_at_random_are_read_or_refused(tmp_path: Path) -> None:
    """Our error, soon, and nothing that a terminal would obey."""
    rng, outcomes, started = random.Random(0), {"read": 0, "refused": 0}, time.perf_counter()
    for _ in range(3000):
        path = write(tmp_path / "x.safetensors", random_header(rng))
        found, said = read(path)
        for tensor in found:
            assert len(tensor.raw(0, tensor.n_bytes)) == tensor.n_bytes <= 64
        assert said.isprintable()
        outcomes["refused" if said else "read"] += 1
    assert min(outcomes.values()) > 500, outcomes
    assert time.perf_counter() - started < 30


def test_headers_with_changed_bytes_are_read_or_refused(copy: CheckpointCopy, tmp_path: Path) -> None:
    data = (copy.write(tmp_path / "source") / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    header, path = data[: 8 + length], tmp_path / "x.safetensors"
    for _ in range(400):
        altered = bytearray(header)
        if rng.random() < 0.5:  # one character for another, which may be part of a name
            altered[rng.randrange(8, len(altered))] = rng.choice(b"0123456789abcXYZ")
        for _ in range(0 if altered != header else rng.choice([1, 2, 5])):
            place = rng.choice([rng.randrange(8), rng.randrange(8, len(altered))])
            altered[place : place + rng.randrange(2)] = rng.randbytes(rng.randrange(1, 3))
        path.write_bytes(bytes(altered) + data[8 + length :])
        _, said = read(path)
        assert said.isprintable()
        outcomes["refused" if said else "read"] += 1
    assert min(outcomes.values()) > 10, outcomes


@pytest.mark.parametrize(
    "header",
    [
        b'{"x": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}',
        json.dumps({"x": {"dtype": "F32", "shape": [10**300] * 100_000, "data_offsets": [0, 8]}}).encode(),
        json.dumps({"x": {"dtype": "F32", "shape": [1 << 40, 0], "data_offsets": [0, 0]}} | {"y": 1}).encode(),
        b'{"a":' * 50_000,
        json.dumps({f"t{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(50_000)}).encode()[
            1:
        ],
    ],
    ids=["digits", "product", "empty but huge", "deep", "many"],
)
def test_headers_that_would_take_long(tmp_path: Path, header: bytes) -> None:
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="is not a usable safetensors file"):
        read_index([write(tmp_path / "x.safetensors", header)])
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_weights_that_run_code_are_explained(copy: CheckpointCopy, tmp_path: Path, name: str) -> None:
    """A checkpoint of PyTorch's own format: why it is not read, and what to do."""
    source = copy.write(tmp_path / "source")
    (source / "model.safetensors").rename(source / name)
    with pytest.raises(CheckpointError, match=rf"as {name}, a format that runs code .* save_pretrained") as caught:
        convert_checkpoint(source, tmp_path / "out")
    assert str(caught.value).endswith(".")
    assert not (tmp_path / "out").exists()
