"""Files that are being written: whole or absent, whichever process is killed; no leftovers, no losses."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edge_runtime.system import atomic_files as module
from edge_runtime.system.atomic_files import (
    ABANDONED_S,
    alone_in,
    make_folder,
    remove_abandoned,
    why_not_written,
    write_whole,
)

needs_locks = pytest.mark.skipif(not module.HAS_LOCKS, reason="this system has no file locks")
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_whole_or_unchanged(tmp_path):
    path = tmp_path / "deeper" / "file"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["file"]
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_whole(path, b"three")
    assert names(path.parent) == ["file"]


WRITING = """
import sys
from pathlib import Path
from edge_runtime.system.atomic_files import write_whole
number = 0
while True:
    number = (number + 1) % 10
    write_whole(Path(sys.argv[1]), str(number).encode() * 200_000)
"""


def test_killed_writers_leave_whole_files_and_the_next_one_cleans_up(tmp_path):
    """Three at once write to one name and are killed at any moment."""
    path = tmp_path / "file"
    for _ in range(3):
        children = [subprocess.Popen([sys.executable, "-c", WRITING, str(path)], env=ENVIRONMENT) for _ in range(3)]
        end = time.monotonic() + 30
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.01)
        for _ in range(20):
            data = path.read_bytes()
            assert data == data[:1] * 200_000
            time.sleep(0.002)
        for child in children:
            child.kill()
        for child in children:
            assert child.wait(20) == -signal.SIGKILL, "a writer ended by itself"
        data = path.read_bytes()
        assert data == data[:1] * 200_000
    write_whole(path, b"end")
    assert names(tmp_path) == (["file"] if module.HAS_LOCKS else names(tmp_path))


@needs_locks
def test_clean_up_removes_nothing_that_is_being_written(tmp_path):
    """However fast both are."""
    over, pattern = threading.Event(), ".file.*.unfinished"

    def tidy() -> None:
        while not over.is_set():
            remove_abandoned(tmp_path.glob(pattern))

    tidying = [threading.Thread(target=tidy) for _ in range(2)]
    for thread in tidying:
        thread.start()
    try:
        for number in range(150):
            write_whole(tmp_path / "file", str(number).encode())
            assert (tmp_path / "file").read_bytes() == str(number).encode()
    finally:
        over.set()
        for thread in tidying:
            thread.join()
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("years", [-30, 0, 30])
def test_without_locks_the_age_decides(tmp_path, monkeypatch, years):
    monkeypatch.setattr(module, "HAS_LOCKS", False)
    old, fresh, future = (tmp_path / name for name in ("old", "fresh", "future"))
    now = time.time() + years * 365 * 86400
    for path, age in ((old, ABANDONED_S + 60), (fresh, 10), (future, -1000)):
        path.write_bytes(b"x")
        os.utime(path, (now - age, now - age))
    monkeypatch.setattr(time, "time", lambda: now)
    remove_abandoned([old, fresh, future, tmp_path / "none"])
    assert names(tmp_path) == ["fresh", "future"]
    write_whole(tmp_path / "file", b"data")
    assert names(tmp_path) == ["file", "fresh", "future"]


@needs_locks
def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    write_whole(tmp_path / "file", b"data")
    with alone_in(tmp_path) as alone:
        assert alone
    (tmp_path / "fresh").write_bytes(b"x")
    remove_abandoned([tmp_path / "fresh"])
    assert names(tmp_path) == ["file", "fresh"]


@needs_locks
def test_a_folder_is_locked_by_one_holder(tmp_path):
    with alone_in(tmp_path) as first:
        assert first
        with alone_in(tmp_path) as second:
            assert not second
    with alone_in(tmp_path) as third:
        assert third
    with alone_in(tmp_path / "none") as fourth:
        assert fourth
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="rights of another kind")
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_nobody_else_can_write_to_what_is_made(tmp_path, umask):
    before = os.umask(umask)
    try:
        make_folder(tmp_path / "a" / "b", 0o700)
        write_whole(tmp_path / "a" / "file", b"x")
        write_whole(tmp_path / "a" / "secret", b"x", mode=0o600)
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b", "a/file", "a/secret")}
    assert modes == {"a": 0o755 & ~umask, "a/b": 0o700, "a/file": 0o644 & ~umask, "a/secret": 0o600}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full ("),
        (getattr(errno, "EDQUOT", errno.ENOSPC), "("),
        (errno.EFBIG, "the file system or a limit (ulimit -f) does not allow files of this size ("),
        (errno.EACCES, "Permission denied"),
        (errno.EROFS, "Read-only file system"),
    ],
)
def test_why_a_file_is_not_written(tmp_path, code, words):
    """Names the file, and the free space where that is the reason; also in a folder that does not exist."""
    found = why_not_written(OSError(code, os.strerror(code)), tmp_path / "none" / "file")
    assert found.startswith(f"{tmp_path / 'none' / 'file'} cannot be written: ")
    assert words in found
    assert ("MB are free)" in found) == (code not in (errno.EACCES, errno.EROFS))
