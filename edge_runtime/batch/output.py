"""The file of answers: it grows by whole lines, and what is in it is done.

- One process at a time has it, by a lock on a file beside it that the system releases however the process ends.
- A line is written by one call, at the end. If that fails (a full disk), what was written of it is cut off; if the
  process is killed, the next one cuts it off.
- Lines reach the disk (`fsync`) once a second and at the end. A killed process loses nothing by that, as the system
  has its lines; a power failure takes a second's answers, which are then computed again. Waiting for the disk after
  every line would cost a fast model more than its answers, and slow ones no less certain.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from edge_runtime.batch.files import digest
from edge_runtime.batch.items import Item
from edge_runtime.batch.lines import Reader, Recorded
from edge_runtime.errors import EdgeRuntimeError, MessageError
from edge_runtime.system.atomic_files import FILE_MODE, reason_of, unfinished

SYNC_S = 1.0
_HEADS = (b'{"id": ', b'{"id":')
"""What every line begins with, ours and OpenAI's."""


class OutputError(EdgeRuntimeError):
    """The file of answers is not to be written to, or cannot be."""


class Output:
    """Answers that are there, and a place for further ones. Used by one thread; use it in a `with`.

    Parameters
    ----------
    read : reads a line.
    """

    def __init__(self, path: Path, read: Reader) -> None:
        self.path, self._read = path, read
        self._real = Path(os.path.realpath(path))  # two links to one file are one output
        self._lock = FileLock(self._real.with_name(f".{self._real.name}.lock"), thread_local=False)
        self._handle = -1
        self._end = 0
        self._synced = time.monotonic()
        self._done: dict[bytes, tuple[str, int]] = {}
        """Item → its question, and its line."""
        self.n_answers = self.n_errors = 0
        """Lines."""
        self.is_mended = False
        """Whether there was a torn line at the end."""

    def open(self, *, drop_errors: bool = False) -> None:
        """Take possession of the file, mend it and find out what is done.

        Parameters
        ----------
        drop_errors : remove the lines of failures, so that their items are tried again.

        Raises
        ------
        OutputError
            When another process has it, it holds something else, or it cannot be written.
        """
        self._acquire()
        try:
            with self._explained():
                self._handle = os.open(self._real, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), FILE_MODE)
                if not stat.S_ISREG(os.fstat(self._handle).st_mode):
                    raise OutputError(f"{self.path} is no regular file; expected one, which can be continued.")
                self._mend()
                if drop_errors and self.n_errors:
                    self._drop_errors()
        except BaseException:
            self.close()
            raise

    def _acquire(self) -> None:
        if self._real.is_dir():
            raise OutputError(f"{self.path} is a folder; expected a file for the answers, such as out.jsonl.")
        if not self._real.parent.is_dir():
            raise OutputError(f"The folder {self._real.parent} does not exist; make it, or write elsewhere.")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(
                f"Another process is writing to {self.path}; wait for its end, or name another file with -o."
            ) from None
        except (OSError, NotImplementedError) as error:
            reason = reason_of(error, self._real) if isinstance(error, OSError) else "the disk has no locks"
            raise OutputError(f"{self.path} cannot be locked: {reason}; write it elsewhere.") from None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {reason_of(error, self._real)}. All answers up to here are kept: "
                "mend that, and run the same command again."
            ) from None

    def _mend(self) -> None:
        number, torn = 0, b""
        with os.fdopen(os.dup(self._handle), "rb") as file:
            file.seek(0)
            for data in file:
                number += 1
                recorded = self._read(data)
                if recorded is None and not data.endswith(b"\n"):
                    torn = data
                    break
                if recorded is None:
                    raise self._foreign(number)
                self._record(recorded, number)
                self._end += len(data)
                if not data.endswith(b"\n"):  # whole but for its end
                    self._write(b"\n")
                    self._end += 1
        if torn:
            if torn.strip(b"\0") and not any(torn.startswith(head[: len(torn)]) for head in _HEADS):
                raise self._foreign(number)
            os.ftruncate(self._handle, self._end)
            self.is_mended = True

    def _foreign(self, number: int) -> OutputError:
        return OutputError(
            f"{self.path} holds something else: line {number} is no answer of a batch of this kind. Nothing was "
            "changed; name another file with -o, or remove that line."
        )

    def _record(self, recorded: Recorded, number: int) -> None:
        key = digest(recorded.id)
        if key in self._done:
            raise OutputError(
                f"{self.path} has two lines about {recorded.id[:200]!r}, {self._done[key][1]} and {number}; "
                "remove one of them, or name another file with -o."
            )
        self._done[key] = recorded.asked, number
        self.n_errors += recorded.is_error
        self.n_answers += not recorded.is_error

    def _drop_errors(self) -> None:
        """Write the file anew without lines of failures, and put it in place of the old one at once."""
        real = self._real
        with unfinished(lambda token: real.with_name(f".{real.name}.{token}.unfinished")) as temporary:
            with os.fdopen(os.dup(self._handle), "rb") as old, temporary.open("wb") as new:
                old.seek(0)
                for data in old:
                    recorded = self._read(data)
                    if recorded is not None and recorded.is_error:
                        del self._done[digest(recorded.id)]
                    else:
                        new.write(data)
                new.flush()
                os.fsync(new.fileno())
                self._end = new.tell()
            temporary.chmod(stat.S_IMODE(os.fstat(self._handle).st_mode))
            os.close(self._handle)
            self._handle = -1
            temporary.replace(real)
        self._handle = os.open(real, os.O_RDWR | getattr(os, "O_BINARY", 0))
        self.n_errors = 0

    def has(self, item: Item) -> bool:
        """Whether an item is done.

        Raises
        ------
        MessageError
            When the answer is one to another question.
        """
        found = self._done.get(digest(item.id))
        if found is None:
            return False
        asked, number = found
        if asked != item.asked:
            raise MessageError(
                f"{self.path} has an answer about {item.id[:200]!r} already (line {number}), but to another "
                "question, with other options or by another model; name another file with -o, or ask as before."
            )
        return True

    def append(self, line: bytes, *, is_error: bool) -> None:
        """Append a whole line, or nothing.

        Raises
        ------
        OutputError
            The file is as it was before.
        """
        with self._explained():
            try:
                self._write(line)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._handle, self._end)
                raise
        self._end += len(line)
        self.n_errors += is_error
        self.n_answers += not is_error
        if time.monotonic() - self._synced > SYNC_S:
            self.sync()

    def _write(self, data: bytes) -> None:
        os.lseek(self._handle, self._end, os.SEEK_SET)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._handle, rest) :]

    def sync(self) -> None:
        """Let everything reach the disk, and see that the file is still the one of this name.

        Raises
        ------
        OutputError
            When it cannot, or somebody has removed or replaced the file.
        """
        with self._explained():
            try:
                os.fsync(self._handle)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
                    raise
            self._synced = time.monotonic()
            try:
                is_here = os.path.samestat(self._real.stat(), os.fstat(self._handle))
            except FileNotFoundError:
                is_here = False
        if not is_here:
            raise OutputError(
                f"{self.path} was removed or replaced meanwhile, so that answers would be lost; run the same command "
                "again to begin anew."
            )

    def close(self) -> None:
        """Let others have the file."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        self._lock.release()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
