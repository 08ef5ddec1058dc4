"""Entries in a folder: whole or not there, never beyond the limit, whoever else writes there."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import MessageError
from edge_runtime.cache.disk import DiskCache
from edge_runtime.system.atomic_files import unfinished

A, B, C = (digit * 32 for digit in "abc")


@pytest.fixture
def cache(tmp_path: Path):
    opened = DiskCache(tmp_path / "cache", 100_000)
    yield opened
    opened.close()


def put(cache: DiskCache, name: str, content: bytes, facts=None) -> None:
    cache.put(name, facts or {}, lambda: content, len(content))
    cache.flush()


def size(cache: DiskCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.iterdir())


def test_what_is_put_can_be_got_also_by_others(cache):
    put(cache, A, b"content", {"n": 3})
    entry = cache.get(A)
    assert (entry.facts, entry.content.tobytes()) == ({"n": 3}, b"content")
    assert cache.has(A)
    assert not cache.has(B)
    assert cache.get(B) is None
    other = DiskCache(cache.folder, 100_000)
    assert other.get(A).content.tobytes() == b"content"
    other.close()


@pytest.mark.parametrize("place", [0, 9, 13, 20, 30, 60, -1])
def test_a_flipped_bit_anywhere_makes_an_entry_disappear(cache, place, caplog):
    put(cache, A, b"content", {"n": 3})
    raw = bytearray(cache.path(A).read_bytes())
    raw[place] ^= 4
    cache.path(A).write_bytes(raw)
    with caplog.at_level(logging.WARNING, "edge_runtime"):
        assert cache.get(A) is None
    assert "damaged" in caplog.text
    assert not cache.path(A).exists()


@pytest.mark.parametrize("length", [0, 10, 56, 60, 500])
def test_a_shorter_or_longer_file_disappears(cache, length):
    put(cache, A, b"content" * 10, {"n": 3})
    cache.path(A).write_bytes((cache.path(A).read_bytes() + b"more" * 200)[:length])
    assert cache.get(A) is None
    assert not cache.path(A).exists()


def test_an_entry_under_another_name_is_not_taken(cache):
    put(cache, A, b"content")
    cache.path(A).rename(cache.path(B))
    assert cache.get(B) is None


def test_what_was_unused_for_longest_leaves_first(cache):
    for name in (A, B):
        put(cache, name, bytes(40_000))
    cache.touch([A])
    put(cache, C, bytes(40_000))
    assert [cache.has(name) for name in (A, B, C)] == [True, False, True]
    assert size(cache) <= 100_000
    put(cache, "d" * 32, bytes(200_000))
    assert not cache.has("d" * 32)


def test_the_first_of_several_names_stays_longest(cache):
    for name in (A, B, C):
        put(cache, name, bytes(30_000))
    cache.touch([B, A, C])
    put(cache, "d" * 32, bytes(30_000))
    assert [cache.has(name) for name in (A, B, C)] == [True, True, False]


def test_the_limit_holds_from_the_start_and_stale_temporary_files_go(cache):
    for name in (A, B):
        put(cache, name, bytes(40_000))
    left, foreign = cache.folder / f".{A}.1.1.tmp", cache.folder / "holiday.jpg"
    for path in (left, foreign):
        path.write_bytes(b"x" * 1000)
    with unfinished(lambda token: cache.folder / f".{B}.{token}.tmp") as at_work:
        for path in (at_work, foreign):  # whatever its age: somebody holds it
            os.utime(path, (0, 0))
        smaller = DiskCache(cache.folder, 50_000)
        assert [cache.has(name) for name in (A, B)] == [False, True]
        assert (left.exists(), at_work.exists(), foreign.exists()) == (False, True, True)
    smaller.close()


@pytest.mark.parametrize("years", [-30, 30])
def test_a_clock_that_is_set_makes_nothing_old(cache, monkeypatch, years):
    """What is used now stays longest, whatever time it is said to be, also for who opens the folder later."""
    for name in (A, B):
        put(cache, name, bytes(40_000))
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + years * 365 * 86400 * 10**9)
    cache.touch([A])
    monkeypatch.setattr(time, "time_ns", lambda: now)
    put(cache, C, bytes(40_000))
    assert [cache.has(name) for name in (A, B, C)] == [True, False, True]
    other = DiskCache(cache.folder, 100_000)
    other.touch([A])
    put(other, B, bytes(40_000))
    assert [cache.has(name) for name in (A, B, C)] == [True, True, False]
    other.close()


def test_a_mapped_entry_survives_its_deletion(cache):
    put(cache, A, b"content")
    entry = cache.get(A)
    cache.forget(A)
    assert entry.content.tobytes() == b"content"


def test_a_folder_that_cannot_be_used_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(MessageError, match="--cache-dir"):
        DiskCache(tmp_path / "file")


@pytest.mark.skipif(os.name == "nt", reason="no such things here")
@pytest.mark.parametrize("what", ["link", "pipe", "folder", "dangling", "loop", "foreign"])
def test_what_is_no_entry_of_ours_is_not_read(cache, tmp_path, monkeypatch, what):
    """Not for a moment: a pipe would never answer, a link may lead to anything."""
    put(cache, A, b"content")
    path, elsewhere = cache.path(A), tmp_path / "elsewhere"
    if what == "foreign":
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        assert cache.get(A) is None
        assert path.exists(), "it is not ours to delete"
        return
    path.rename(elsewhere)
    if what == "link":
        path.symlink_to(elsewhere)
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "none" if what == "dangling" else path)
    assert cache.get(A) is None
    assert elsewhere.read_bytes().endswith(b"content")
    put(cache, B, b"content")
    assert cache.get(B).content.tobytes() == b"content"
    if what != "folder":
        put(cache, A, b"content")
        assert cache.get(A).content.tobytes() == b"content"
        assert not path.is_symlink()


@pytest.mark.skipif(os.name == "nt", reason="rights of another kind")
@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_rights_do_not_depend_on_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        cache = DiskCache(tmp_path / "above" / "cache", 100_000)
        put(cache, A, b"content")
        cache.close()
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "above", cache.folder, cache.path(A))]
    assert modes == [0o755 & ~umask, 0o700, 0o600]


def test_a_full_disk_ends_the_keeping_and_nothing_else(cache, monkeypatch, caplog):
    def fail(self, name, facts, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiskCache, "_write_file", fail)
    with caplog.at_level(logging.WARNING, "edge_runtime"):
        put(cache, A, b"content")
        put(cache, B, b"content")
    assert caplog.text.count("the disk is full (") == 1
    assert not cache.has_room
    monkeypatch.undo()


def test_what_is_kept_is_nobody_elses_business(cache):
    put(cache, A, b"content")
    if os.name != "nt":
        assert cache.folder.stat().st_mode & 0o077 == 0
        assert cache.path(A).stat().st_mode & 0o077 == 0


WRITER = """
import random, sys
from edge_runtime.cache.disk import DiskCache
rng, cache = random.Random(int(sys.argv[2])), DiskCache(sys.argv[1], 300_000)
for _ in range(300):
    number = rng.randrange(40)
    name, content = f"{number:032x}", bytes([number]) * (1000 + 400 * number)
    cache.put(name, {"number": number}, lambda content=content: content, len(content))
    entry = cache.get(f"{rng.randrange(40):032x}")
    if entry is not None:
        number = entry.facts["number"]
        assert entry.content.tobytes() == bytes([number]) * (1000 + 400 * number)
cache.close()
"""


def test_processes_share_a_folder(tmp_path):
    folder = tmp_path / "cache"
    children = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(seed)], stderr=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    for child in children:
        _, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
        assert not err
    cache = DiskCache(folder, 300_000)
    assert size(cache) <= 300_000
    present = [number for number in range(40) if cache.has(f"{number:032x}")]
    assert len(present) > 5
    for number in present:
        assert np.array_equal(cache.get(f"{number:032x}").content, np.full(1000 + 400 * number, number, np.uint8))
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    cache.close()


def test_random_bytes_are_never_an_entry(cache):
    rng = random.Random(3)
    put(cache, A, b"content", {"n": 3})
    good = cache.path(A).read_bytes()
    for _ in range(300):
        raw = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        cache.path(A).write_bytes(raw[: rng.randrange(len(raw) + 1)] if rng.random() < 0.3 else raw)
        entry = cache.get(A)
        assert entry is None or cache.path(A).read_bytes() == good
        cache.path(A).write_bytes(good)
