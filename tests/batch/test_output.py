"""The file of answers: mended, locked, never in halves."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from edge_runtime.batch.items import Failure, Item
from edge_runtime.batch.lines import encoded, line_of, read_line
from edge_runtime.batch.output import Output, OutputError
from edge_runtime.errors import MessageError


def item(name: str, asked: str = "q") -> Item:
    return Item(name, {"input": name}, [], asked=asked)


def good(name: str, asked: str = "q") -> bytes:
    return encoded({"id": name, "asked": asked, "error": None, "answer": "é\u2028"})


def bad(name: str) -> bytes:
    return line_of(item(name), Failure("ImageError", "It is damaged."))


def opened(path: Path, *, drop_errors: bool = False) -> Output:
    output = Output(path, read_line)
    output.open(drop_errors=drop_errors)
    return output


def test_lines_have_one_line_end_whatever_is_in_them():
    assert len(good("a").decode().splitlines()) == 1
    name = os.fsdecode(b"\xff.png")
    recorded = read_line(encoded({"id": name, "asked": "", "error": None, "answer": ""}))
    assert recorded is not None
    assert recorded.id == name


def test_what_is_in_the_file_is_done(tmp_path):
    path = tmp_path / "out.jsonl"
    with opened(path) as output:
        assert not output.has(item("a"))
        output.append(good("a"), is_error=False)
        output.append(bad("b"), is_error=True)
        output.sync()
    with opened(path) as output:
        assert output.has(item("a"))
        assert output.has(item("b"))
        assert not output.has(item("c"))
        assert (output.n_answers, output.n_errors) == (1, 1)
        with pytest.raises(MessageError, match=r"'a' already \(line 1\), but to another question"):
            output.has(item("a", "other"))


def test_a_line_torn_anywhere_is_cut_off(tmp_path):
    path, whole, last = tmp_path / "out.jsonl", good("a") + bad("b"), good("c")
    for n in range(1, len(last) - 1):
        path.write_bytes(whole + last[:n])
        with opened(path) as output:
            assert path.read_bytes() == whole
            assert not output.has(item("c"))
            output.append(last, is_error=False)
        assert path.read_bytes() == whole + last
    path.write_bytes(whole + last[:-1])  # all but its end
    with opened(path) as output:
        assert output.has(item("c"))
    assert path.read_bytes() == whole + last


def test_blocks_of_zeros_of_a_power_failure_are_cut_off(tmp_path):
    path = tmp_path / "out.jsonl"
    for tail in (b"\0" * 4096, good("b")[:9] + b"\0" * 99):
        path.write_bytes(good("a") + tail)
        with opened(path):
            pass
        assert path.read_bytes() == good("a")


@pytest.mark.parametrize(
    "content", [b"\x89PNG\r\n\x1a\n\0\0", b"notes\n", b'{"id": "a"}\n', b"[1]", b'{"custom_id": 1']
)
def test_another_file_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "out.jsonl"
    path.write_bytes(good("z") + content)
    with pytest.raises(OutputError, match="line 2 is no answer"):
        opened(path)
    assert path.read_bytes() == good("z") + content


def test_an_item_with_two_lines_is_told(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(good("a") + good("a"))
    with pytest.raises(OutputError, match="two lines about 'a', 1 and 2"):
        opened(path)


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "out.jsonl"
    link = tmp_path / "link.jsonl"
    with opened(path):
        link.symlink_to(path)
        for name in (path, link):
            with pytest.raises(OutputError, match="Another process is writing"):
                opened(name)
    with opened(link) as output:
        output.append(good("a"), is_error=False)
    assert path.read_bytes() == good("a")


@pytest.mark.parametrize(
    ("name", "message"), [("", "is a folder"), ("no/out.jsonl", "does not exist"), ("pipe", "no regular file")]
)
def test_what_cannot_be_continued_is_refused(tmp_path, name, message):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match=message):
        opened(tmp_path / name)


def test_a_full_disk_leaves_no_half(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    write = os.write

    def almost_full(handle: int, data: memoryview) -> int:
        if len(data) > 20:
            return write(handle, data[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with opened(path) as output:
        output.append(good("a"), is_error=False)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", almost_full)
            with pytest.raises(OutputError, match=r"the disk is full.*run the same command"):
                output.append(good("b"), is_error=False)
        assert path.read_bytes() == good("a")
        output.append(good("c"), is_error=False)
    assert path.read_bytes() == good("a") + good("c")


def test_a_file_that_was_taken_away_is_told(tmp_path):
    path = tmp_path / "out.jsonl"
    with opened(path) as output:
        output.append(good("a"), is_error=False)
        path.unlink()
        with pytest.raises(OutputError, match="removed or replaced"):
            output.sync()


def test_failures_are_dropped_to_be_tried_again(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(good("a") + bad("b") + good("c") + bad("d")[:-9])
    path.chmod(0o640)
    with opened(path, drop_errors=True) as output:
        assert path.read_bytes() == good("a") + good("c")
        assert not output.has(item("b"))
        output.append(good("b"), is_error=False)
        output.sync()
    assert path.read_bytes() == good("a") + good("c") + good("b")
    assert path.stat().st_mode & 0o777 == 0o640
    assert [found.name for found in tmp_path.iterdir() if "unfinished" in found.name] == []
