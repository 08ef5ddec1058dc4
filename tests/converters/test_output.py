"""What stands in the output folder when a conversion fails, is interrupted or killed, and what the command says."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import pytest
from click.testing import CliRunner

from checkpoint_copies import CheckpointCopy
from edge_converters import convert_checkpoint
from edge_converters.convert import ConversionKeywords, ConversionOptions, Converted
from edge_converters.output import gguf_writer as writer
from edge_runtime.cli.program import main
from edge_runtime.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "converters"))}
STAGES = ("vision", "decoder", "quantize")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def fail_in(stage: str, error: BaseException) -> Any:
    """A progress callback that raises in the middle of a stage."""

    def progress(what: str, done: int, total: int) -> None:
        if what == stage and done > total // 2:
            raise error

    return progress


def test_every_option_has_a_keyword_of_its_type_and_others_are_refused(checkpoint, tmp_path):
    assert get_type_hints(ConversionKeywords) == get_type_hints(ConversionOptions)
    assert all(name in ConversionOptions.__doc__ for name in get_type_hints(ConversionOptions))
    with pytest.raises(TypeError, match="unexpected keyword argument 'decoder'"):
        convert_checkpoint(checkpoint, tmp_path / "out", decoder="f16")
    assert not (tmp_path / "out").exists()


# --- where the files go ---------------------------------------------------------------------------------------


def test_existing_files_are_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    """Either of the two is enough to refuse, and --force replaces both."""
    for name in ("ggml-model-Q8_0.gguf", "mmproj-model-q8_0.gguf"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(b"precious")
        with pytest.raises(CheckpointError, match=f"{name} exists already; choose another folder .* or pass --force"):
            convert_checkpoint(checkpoint, folder, decoder_type="q8_0")
        assert names(folder) == [name]
        assert (folder / name).read_bytes() == b"precious"
        convert_checkpoint(checkpoint, folder, decoder_type="q8_0", force=True)
        assert names(folder) == ["ggml-model-Q8_0.gguf", "mmproj-model-q8_0.gguf"]
        assert (folder / name).read_bytes()[:4] == b"GGUF"


def test_a_failed_replacement_keeps_the_old_files(checkpoint: Path, tmp_path: Path) -> None:
    files = convert_checkpoint(checkpoint, tmp_path)
    before = [path.read_bytes() for path in (files.decoder, files.mmproj)]
    with pytest.raises(RuntimeError, match="stop"):
        convert_checkpoint(checkpoint, tmp_path, force=True, progress=fail_in("quantize", RuntimeError("stop")))
    assert [path.read_bytes() for path in (files.decoder, files.mmproj)] == before
    assert names(tmp_path) == sorted(path.name for path in (files.decoder, files.mmproj))


def test_a_folder_in_the_place_of_a_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "ggml-model-Q4_K_M.gguf").mkdir()
    with pytest.raises(CheckpointError, match="is a folder, expected a file or nothing"):
        convert_checkpoint(checkpoint, tmp_path, force=True)
    assert names(tmp_path) == ["ggml-model-Q4_K_M.gguf"]


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_folder_that_cannot_be_made(checkpoint: Path, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cannot be written: .*; choose another folder"):
        convert_checkpoint(checkpoint, tmp_path / "file" / below)
    assert (tmp_path / "file").read_bytes() == b""


NOBODY = 65534


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["not writable", "not even listable"])
def test_a_folder_without_permission(checkpoint: Path, mode: int) -> None:
    """As another user where the tests run as root, who may write everywhere; hence not below pytest's own folder."""
    with tempfile.TemporaryDirectory() as base:
        Path(base).chmod(0o755)
        shutil.copytree(checkpoint, Path(base) / "checkpoint")
        locked = Path(base) / "locked"
        locked.mkdir(mode=mode)
        user = os.geteuid()
        if user == 0:
            os.seteuid(NOBODY)
        try:
            with pytest.raises(CheckpointError, match="cannot be written: Permission denied"):
                convert_checkpoint(Path(base) / "checkpoint", locked)
        finally:
            os.seteuid(user)
            locked.chmod(0o755)


# --- full disks -----------------------------------------------------------------------------------------------


def test_a_disk_without_room_is_refused_first(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1_000_000))
    with pytest.raises(CheckpointError, match=r"has 0.0 GB free, the file needs"):
        convert_checkpoint(checkpoint, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("stage", ["vision", "decoder"])
def test_a_disk_that_fills_up(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    whole = writer.PlannedTensor.encoded_chunks
    last = {"vision": "resampler.proj.weight", "decoder": "blk.2.ffn_down.weight"}[stage]

    def chunks(tensor: writer.PlannedTensor) -> Iterator[np.ndarray]:
        if tensor.name == last:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield from whole(tensor)

    monkeypatch.setattr(writer.PlannedTensor, "encoded_chunks", chunks)
    name = {"vision": "mmproj-model-q8_0.gguf", "decoder": "ggml-model-Q4_K_M.gguf"}[stage]
    with pytest.raises(
        CheckpointError, match=rf"{name} cannot be written: the disk is full \(.* MB are free\); free"
    ):
        convert_checkpoint(checkpoint, tmp_path)
    assert names(tmp_path) == []


@pytest.fixture
def file_size_limit() -> Iterator[Any]:
    """Function that lets every write of this process beyond some bytes fail: Python ignores the signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_cannot_grow(checkpoint: Path, tmp_path: Path, file_size_limit: Any) -> None:
    file_size_limit(1 << 20)
    with pytest.raises(
        CheckpointError,
        match=r"mmproj-model-q8_0.gguf cannot be written: does not allow files of this size.* \(.* MB are free\)",
    ):
        convert_checkpoint(checkpoint, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["q4_0", "q4_k_m"])
def test_a_quantizer_that_cannot_write(checkpoint: Path, tmp_path: Path, file_size_limit: Any, kind: str) -> None:
    """llama.cpp itself meets the full disk."""

    def progress(what: str, done: int, total: int) -> None:
        if what == "quantize":
            file_size_limit(200_000)

    with pytest.raises(CheckpointError, match=f"could not quantize to {kind.upper()}: .*; free disk space"):
        convert_checkpoint(checkpoint, tmp_path, decoder_type=kind, progress=progress)
    assert names(tmp_path) == []


# --- interruptions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")], ids=["interrupt", "error"])
def test_an_interruption_leaves_nothing(checkpoint: Path, tmp_path: Path, stage: str, error: BaseException) -> None:
    with pytest.raises(type(error)):
        convert_checkpoint(checkpoint, tmp_path, progress=fail_in(stage, error))
    assert names(tmp_path) == []


def test_ctrl_c_stops_the_quantizer_at_the_next_tensor(checkpoint: Path, tmp_path: Path) -> None:
    """A real signal, which Python would raise inside llama.cpp's callback and lose there."""
    seen = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "quantize":
            seen.append(done)
            if done == 3:
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(checkpoint, tmp_path, progress=progress)
    assert seen == [1, 2, 3]
    assert names(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_conversions_work_on_other_threads(checkpoint: Path, tmp_path: Path) -> None:
    """Signals belong to the main thread; elsewhere the quantizer must leave them alone."""
    done: list[Converted] = []
    thread = threading.Thread(target=lambda: done.append(convert_checkpoint(checkpoint, tmp_path)))
    thread.start()
    thread.join()
    assert len(done) == 1


SLOW_CONVERSION = """
import sys, time
from edge_converters import convert_checkpoint
def progress(what, done, total):
    if what == sys.argv[3] and done > total // 2:
        print(what, flush=True)
        time.sleep(60)
convert_checkpoint(sys.argv[1], sys.argv[2], progress=progress)
"""


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_conversion_leaves_nothing_under_a_final_name(checkpoint: Path, tmp_path: Path, stage: str) -> None:
    command = [sys.executable, "-c", SLOW_CONVERSION, str(checkpoint), str(tmp_path), stage]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == f"{stage}\n"
        child.kill()
    left = names(tmp_path)
    assert left
    assert all(name.startswith(".") for name in left)
    files = convert_checkpoint(checkpoint, tmp_path)  # what was left is no hindrance, and gone
    assert names(tmp_path) == sorted(path.name for path in (files.decoder, files.mmproj))


# --- the command ----------------------------------------------------------------------------------------------


def test_what_killed_conversions_left_is_removed_by_the_next(checkpoint: Path, tmp_path: Path) -> None:
    """Only what nobody holds any more, whatever its age, and only of the files that are made."""
    old, other = (tmp_path / f".{name}.incomplete-1-lossless" for name in ("ggml-model-F32.gguf", "x.gguf"))
    for path in (old, other):
        path.write_bytes(b"unfinished")
    with writer.beside(tmp_path / "mmproj-model-f32.gguf") as held:
        os.utime(held, (0, 0))
        convert_checkpoint(checkpoint, tmp_path, decoder_type="f32", vision_type="f32")
        assert (old.exists(), held.exists(), other.exists()) == (False, True, True)


def test_two_conversions_into_one_folder(checkpoint: Path, tmp_path: Path) -> None:
    """The second is refused while the first is at work, and leaves it alone; the pair is of one conversion."""
    said: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "decoder" and not said:
            command = [
                sys.executable,
                "-m",
                "edge_runtime",
                "convert",
                str(checkpoint),
                "-o",
                str(tmp_path),
                "--force",
            ]
            said.append(subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False).stderr)
            with pytest.raises(CheckpointError, match="Another conversion is writing to"):
                convert_checkpoint(checkpoint, tmp_path, decoder_type="f16")  # nor in this process

    files = convert_checkpoint(checkpoint, tmp_path, progress=progress)
    assert said[0].startswith("edge-runtime: Another conversion is writing to")
    assert said[0].count("\n") == 1
    assert names(tmp_path) == sorted(path.name for path in (files.decoder, files.mmproj))


def test_what_was_made_meanwhile_is_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    """By a program that knows no lock."""

    def progress(what: str, done: int, total: int) -> None:
        (tmp_path / "mmproj-model-q8_0.gguf").write_bytes(b"precious")

    with pytest.raises(CheckpointError, match="exists already"):
        convert_checkpoint(checkpoint, tmp_path, progress=progress)
    assert names(tmp_path) == ["mmproj-model-q8_0.gguf"]
    assert (tmp_path / "mmproj-model-q8_0.gguf").read_bytes() == b"precious"


def test_killed_between_two_replacements_there_is_no_mixed_model(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_checkpoint(checkpoint, tmp_path)
    replace, seen = Path.replace, []

    def look(self: Path, target: Path) -> Path:
        seen.append([name for name in names(tmp_path) if not name.startswith(".")])
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", look)
    convert_checkpoint(checkpoint, tmp_path, force=True)
    assert seen == [["mmproj-model-q8_0.gguf"]] * 2


def test_the_command_prints_the_two_files(checkpoint: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["convert", str(checkpoint), "-o", str(tmp_path), "--type", "Q4_K_M"])
    assert result.exit_code == 0
    lines = [line.split("  ")[0] for line in result.stdout.splitlines()]
    assert lines == [str(tmp_path / name) for name in ("ggml-model-Q4_K_M.gguf", "mmproj-model-q8_0.gguf")]
    assert result.stderr == ""


def test_the_command_names_the_folder_after_the_checkpoint(
    copy: CheckpointCopy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy.write(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, ["convert", "tiny", "--type", "f16", "--vision-type", "f16"]).exit_code == 0
    assert names(tmp_path / "models" / "tiny") == ["ggml-model-F16.gguf", "mmproj-model-f16.gguf"]


def test_the_commands_errors_are_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    command = ["convert", str(checkpoint), "-o", str(tmp_path), "--type", "q8_0"]
    assert CliRunner().invoke(main, command).exit_code == 0
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 1
    assert again.stdout == ""
    assert again.stderr.startswith("edge-runtime: ")
    assert again.stderr.endswith("or pass --force to replace it.\n")
    assert again.stderr.count("\n") == 1
    assert CliRunner().invoke(main, [*command, "--force"]).exit_code == 0
    nowhere = CliRunner().invoke(main, ["convert", str(tmp_path / "nowhere")])
    assert (nowhere.exit_code, nowhere.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize("option", ["--type", "--vision-type"])
def test_unknown_types_are_a_usage_error(checkpoint: Path, tmp_path: Path, option: str) -> None:
    result = CliRunner().invoke(main, ["convert", str(checkpoint), "-o", str(tmp_path), option, "q3_k_s"])
    assert result.exit_code == 2
    assert f"{option} is 'q3_k_s'; expected one of f32" in result.stderr
    assert names(tmp_path) == []


def test_the_command_stops_with_130(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_runtime.cli.terminal import ConvertProgress

    monkeypatch.setattr(
        ConvertProgress, "__call__", lambda self, *args: fail_in("quantize", KeyboardInterrupt())(*args)
    )
    result = CliRunner().invoke(main, ["convert", str(checkpoint), "-o", str(tmp_path)])
    assert result.exit_code == 130
    assert names(tmp_path) == []
