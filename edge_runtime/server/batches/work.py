"""One batch at work: the next lines to answer, and the two files to which answers are appended.

What is in these files is done, also after the process was killed at any time: a torn last line is cut off at the next
start, and its request is answered again. So every request has exactly one line in the end.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edge_runtime.server.batches.lines import ENDPOINTS, Line, max_line_bytes, parse, raw_lines
from edge_runtime.server.batches.records import OWNER_ONLY
from edge_runtime.server.settings import Settings

OUTPUT, ERRORS = ".output", ".errors"
PIECE_BYTES = 1 << 20
ALL_ENDPOINTS = (*ENDPOINTS, "/v1/messages")


class Appended:
    """A file of lines that grows by whole ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end = 0

    def mend(self) -> dict[str, bool]:
        """Cut off what is no whole line; returns the custom_ids of those that are there: whether they have replies.

        Raises
        ------
        OSError
        """
        found: dict[str, bool] = {}
        self._end = 0
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return found
        with file:
            for data in file:
                written = _written(data)
                if written is None:  # torn; or, after a power failure, blocks of zeros
                    break
                found[written[0]] = written[1]
                self._end += len(data)
        if self._end < self.path.stat().st_size:
            os.truncate(self.path, self._end)
        return found

    def append(self, data: bytes) -> None:
        """Append a whole line, or nothing.

        It need not reach the disk at once: what a power failure takes is computed again.

        Raises
        ------
        OSError
        """
        handle = os.open(self.path, os.O_CREAT | os.O_WRONLY | getattr(os, "O_BINARY", 0), OWNER_ONLY)
        try:
            try:
                os.lseek(handle, self._end, os.SEEK_SET)
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(handle, rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, self._end)
                raise
        finally:
            os.close(handle)
        self._end += len(data)

    def finish(self) -> None:
        """Let everything reach the disk, before the lines are called complete.

        Raises
        ------
        OSError
        """
        handle = os.open(self.path, os.O_RDWR | getattr(os, "O_BINARY", 0))
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _written(data: bytes) -> tuple[str, bool] | None:
    """The custom_id of a whole line, and whether it has a reply."""
    if not data.endswith(b"\n"):
        return None
    try:
        line = json.loads(data)
        found, has_reply = line["custom_id"], line["response"] is not None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (found, has_reply) if isinstance(found, str) else None


class Work:
    """The work on one batch. Lines may be taken in one thread while answers are put in another.

    Parameters
    ----------
    folder, name : of the batch's own files.
    source : its input.
    """

    def __init__(self, folder: Path, name: str, source: Path, settings: Settings) -> None:
        self._source, self._settings = source, settings
        self.output, self.errors = Appended(folder / f"{name}{OUTPUT}"), Appended(folder / f"{name}{ERRORS}")
        self._done: set[str] = set()
        self.completed = self.failed = self.unanswered = 0
        self._file: BinaryIO | None = None
        self._lines: Iterator[tuple[int, bytes]] = iter(())
        self._returned: deque[Line] = deque()
        self._is_read = False
        self.at_hand: set[str] = set()
        """Ids of lines that were taken and are neither done nor returned."""

    def open(self) -> None:
        """Find out what is done.

        Raises
        ------
        OSError
        """
        completed, failed = self.output.mend(), self.errors.mend()
        self.completed, self.failed = len(completed), len(failed)
        self.unanswered = sum(not has_reply for has_reply in failed.values())
        self._done = {*completed, *failed}
        self._file = self._source.open("rb")
        self._lines = raw_lines(self._file, max_line_bytes(self._settings))

    def close(self) -> None:
        """Close the input."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._lines = iter(())

    @property
    def is_done(self) -> bool:
        """Whether every line has its answer."""
        return self._is_read and not self._returned and not self.at_hand

    def take(self) -> Line | None:
        """The next line without an answer; None when all others are at hand or done.

        Raises
        ------
        LineRefused, OSError
            When the input has become unreadable.
        """
        if self._returned:
            line = self._returned.popleft()
            self.at_hand.add(line.custom_id)
            return line
        for number, data in self._lines:
            line = parse(data, number, self._settings, ALL_ENDPOINTS)
            if line.custom_id not in self._done:
                self.at_hand.add(line.custom_id)
                return line
        self._is_read = True
        return None

    def give_back(self, line: Line) -> None:
        """Return a line that got no answer; it is the next one."""
        self._returned.appendleft(line)
        self.at_hand.discard(line.custom_id)

    def put(self, line: Line, data: bytes, *, is_answer: bool, has_reply: bool = True) -> None:
        """Append a line's answer, or error.

        Raises
        ------
        OSError
            Nothing was appended; the line is still at hand.
        """
        (self.output if is_answer else self.errors).append(data)
        self._done.add(line.custom_id)
        self.at_hand.discard(line.custom_id)
        self.completed += is_answer
        self.failed += not is_answer
        self.unanswered += not has_reply
