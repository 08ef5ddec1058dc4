"""A model file that is truncated, or written to, while in use: reported before it is used, or as the process ends."""

from __future__ import annotations

import gc
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import Model, ModelFileError
from edge_runtime.system.bus_errors import MAX_RANGES, shared_watch, watch_memory
from edge_runtime.weights.gguf_file import GGUFFile

has_bus_errors = pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="mapped files cannot be cut here")
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "converters"))}


@pytest.fixture
def folder(exact_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that may be damaged."""
    return Path(shutil.copytree(exact_folder, tmp_path / "model"))


def decoder_of(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if "mmproj" not in path.name)
    return found


def mmproj_of(folder: Path) -> Path:
    (found,) = folder.glob("mmproj*")
    return found


def cut(path: Path) -> None:
    os.truncate(path, 30_000)


def rewrite(path: Path) -> None:
    """As `cp` does: the same file, other contents, perhaps of the same length."""
    data = path.read_bytes()
    path.write_bytes(data[:-100] + bytes(100))


@pytest.mark.parametrize("spoil", [cut, rewrite])
@pytest.mark.parametrize("choose", [decoder_of, mmproj_of])
def test_a_file_that_was_written_to_is_refused(folder, spoil, choose):
    with Model.load(folder, exact=True, n_threads=1) as model:
        model.chat("Why?", max_tokens=1)
        spoil(choose(folder))
        with pytest.raises(
            ModelFileError, match=rf"{choose(folder).name} was written to since it was loaded .*; load"
        ):
            model.chat("Why?", max_tokens=1)


def test_a_file_that_was_replaced_or_deleted_stays_in_use(folder, tmp_path):
    with Model.load(folder, exact=True, n_threads=1) as model:
        expected = str(model.chat("Why?", max_tokens=5, greedy=True))
        (tmp_path / "new").write_bytes(b"GGUF")
        (tmp_path / "new").replace(decoder_of(folder))
        mmproj_of(folder).unlink()
        assert str(model.chat("Why?", max_tokens=5, greedy=True)) == expected


def test_no_handle_is_left(folder):
    GGUFFile(decoder_of(folder))
    count = len([*Path("/proc/self/fd").iterdir()]) if Path("/proc/self/fd").exists() else None
    for _ in range(20):
        GGUFFile(decoder_of(folder))
    if count is not None:
        assert len([*Path("/proc/self/fd").iterdir()]) <= count
    if (watch := shared_watch()) is not None:
        assert str(decoder_of(folder)) not in watch.names


ANSWER = """
import os, sys
from pathlib import Path
from edge_runtime import Model
folder, name = Path(sys.argv[1]), sys.argv[2]
model = Model.load(folder, exact=True, n_threads=2)
stream = model.chat("Why?", stream=True, max_tokens=2000, repetition_check=False, ignore_eos=True)
print(next(stream) is not None, flush=True)
os.truncate(folder / name, 30_000)
stream.result()
print("answered")
"""


def ended(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )


@has_bus_errors
@pytest.mark.every_core
def test_a_decoder_that_is_cut_while_it_answers_is_named(folder):
    """In llama.cpp's threads, and in its own mapping."""
    path = decoder_of(folder)
    done = ended(ANSWER, str(folder), path.name)
    assert done.returncode == -signal.SIGBUS, done.stderr
    assert done.stdout == "True\n"
    assert done.stderr.count("edge-runtime: ") == 1
    assert re.search(
        rf"{re.escape(str(path))} was cut short while it was in use, .*the process ends.*\n", done.stderr
    )


READ = """
import faulthandler, os, sys, threading
from pathlib import Path
import numpy as np
from edge_runtime.weights.gguf_file import GGUFFile
if sys.argv[2] == "faulthandler":
    faulthandler.enable()
file = GGUFFile(Path(sys.argv[1]))
data, _ = file.tensor_bytes(None)
os.truncate(sys.argv[1], 4096)
if sys.argv[2] == "many":
    threads = [threading.Thread(target=lambda: data.sum(), daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
if sys.argv[2] == "forked":
    if os.fork():
        _, status = os.wait()
        os.kill(os.getpid(), os.WTERMSIG(status))
print(data.sum())
"""


@has_bus_errors
@pytest.mark.parametrize("how", ["alone", "many", "faulthandler", "forked"])
def test_a_file_that_is_cut_while_it_is_read_is_named_once(folder, how):
    """Whichever thread reads it: one that holds the GIL, several at once, one with a handler before ours."""
    path = mmproj_of(folder)
    done = ended(READ, str(path), how)
    assert done.returncode == -signal.SIGBUS, done.stderr
    assert done.stdout == ""
    assert done.stderr.count(f"edge-runtime: {path} was cut short while it was in use") == 1
    assert "Put the file back" in done.stderr
    assert ("Fatal Python error: Bus error" in done.stderr) == (how == "faulthandler")


@has_bus_errors
def test_a_signal_that_somebody_sends_ends_the_process_without_blame(folder):
    script = READ.replace("print(data.sum())", "os.kill(os.getpid(), 7 if sys.platform == 'linux' else 10)")
    done = ended(script, str(mmproj_of(folder)), "sent")
    assert done.returncode == -signal.SIGBUS
    if sys.platform == "linux":  # elsewhere the two are indistinguishable
        assert "edge-runtime" not in done.stderr


OTHERS = """
import mmap, os, sys
from pathlib import Path
from edge_runtime.weights.gguf_file import GGUFFile
file = GGUFFile(Path(sys.argv[1]))
with open(sys.argv[2], "w+b") as other:
    other.truncate(1 << 16)
    data = mmap.mmap(other.fileno(), 1 << 16)
    os.truncate(sys.argv[2], 100)
print(data[1 << 15])
"""


@has_bus_errors
def test_memory_of_others_gets_the_general_text(folder, tmp_path):
    done = ended(OTHERS, str(mmproj_of(folder)), str(tmp_path / "theirs"))
    assert done.returncode == -signal.SIGBUS
    assert "edge-runtime: memory that was in use is gone: one of" in done.stderr
    assert mmproj_of(folder).name in done.stderr


@has_bus_errors
def test_more_ranges_than_the_table_holds(tmp_path):
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    watch = shared_watch()
    assert watch is not None
    gc.collect()  # files that other tests left are not forgotten meanwhile
    before = sum(map(bool, watch.names))
    forgets = [watch_memory(address, 1, tmp_path / "x") for _ in range(MAX_RANGES + 10)]
    assert sum(map(bool, watch.names)) == MAX_RANGES
    for forget in forgets:
        forget()
    for number in range(2000):  # as entries of a cache come and go: none of them is kept
        watch_memory(address, 1, tmp_path / str(number))()
    assert sum(map(len, watch.texts)) <= 4 * (MAX_RANGES + 1)
    assert sum(map(bool, watch.names)) == before
