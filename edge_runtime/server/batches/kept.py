"""The batches that are kept: their records on disk and in memory, and the folder that one process has at a time.

The folder is held by a lock that the system releases however the process ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from edge_runtime.errors import StoreFull
from edge_runtime.server.batches.files import Files
from edge_runtime.server.batches.records import BatchRecord, read_all, write
from edge_runtime.server.batches.work import Work
from edge_runtime.server.errors import RequestError, ServerError
from edge_runtime.server.settings import Settings
from edge_runtime.store.download import storing
from edge_runtime.store.names import visible
from edge_runtime.system.atomic_files import make_folder

logger = logging.getLogger("edge_runtime.server")

MAX_UNFINISHED = 100
"""Batches of all clients together."""
MAX_BATCHES = 10_000
"""Records of all clients together; beyond that, the oldest of those that have ended are forgotten."""


class BatchNotKept(ServerError):  # noqa: N818 - says what is the matter
    """No batch has this id, or it is another client's."""

    status, param = 404, "id"


class InUse(ServerError):  # noqa: N818 - says what is the matter
    """Another process works in the folder."""

    status, code = 503, "files_in_use"


class NotCancellable(ServerError):  # noqa: N818 - says what is the matter
    """The batch has ended."""

    status = 409


class Kept:
    """Batches of one server, and the files that they read and make.

    Parameters
    ----------
    root : their folder; created by `open`.
    """

    def __init__(self, root: Path, settings: Settings) -> None:
        self._root, self._settings = root, settings
        self.folder = root / "batches"
        self.records: dict[str, BatchRecord] = {}
        self._needed: dict[str, str] = {}
        """Input file → batch that reads it."""
        self.files = Files(root / "files", settings, self._needed.__contains__)
        self.works: dict[str, Work] = {}
        """Of batches that are being worked through."""
        self._held: FileLock | None = None
        self._opening = threading.Lock()

    # --- opening and closing ----------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether this process has the folder."""
        return self._held is not None

    def open(self) -> None:
        """Take possession of the folder, and read the records, if that has not happened yet.

        Raises
        ------
        InUse
            When another process has it.
        StoreError
            When it cannot be written to.
        """
        with self._opening:
            if self._held is not None:
                return
            lock = FileLock(self._root / "lock", thread_local=False, mode=0o600)
            with storing(self._root, "try again"):
                for folder in (self._root, self.folder, self.files.folder):
                    make_folder(folder, 0o700)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    raise InUse(
                        "Another server of this machine keeps the files and batches here; ask that one, or start "
                        "this one with another store (EDGE_RUNTIME_MODELS)."
                    ) from None
            try:
                self._load()
            except BaseException:
                lock.release()
                raise
            self._held = lock

    def _load(self) -> None:
        self.records = read_all(self.folder, BatchRecord)
        unfinished = self.unfinished()
        self._needed |= {record.input_file_id: record.id for record in unfinished}
        promised = {
            name
            for record in unfinished
            for name in (record.output_file_id, record.error_file_id)
            if name is not None
        }
        self.files.open(promised)
        if unfinished:
            logger.info("%d batches go on where they were.", len(unfinished))

    def close(self) -> None:
        """Let others have the folder."""
        for work in self.works.values():
            work.close()
        self.works.clear()
        if self._held is not None:
            self._held.release()
            self._held = None

    # --- asking -----------------------------------------------------------------------------------------------

    def get(self, owner: str, name: str, prefix: str = "batch_") -> BatchRecord:
        """A batch of this owner, with the numbers of this moment.

        Raises
        ------
        BatchNotKept
        """
        record = self.records.get(name)
        if record is None or record.owner != owner or not name.startswith(prefix):
            raise BatchNotKept(f"No batch has the id {visible(name[:80])!r}; ask for the list of batches.")
        return self.counted(record)

    def all(self, owner: str, prefix: str = "batch_") -> list[BatchRecord]:
        """Batches of this owner, oldest first."""
        found = [record for record in [*self.records.values()] if record.owner == owner]
        return [self.counted(record) for record in found if record.id.startswith(prefix)]

    def counted(self, record: BatchRecord) -> BatchRecord:
        """A batch with the numbers of this moment."""
        work = self.works.get(record.id)
        if work is None:
            return record
        return replace(record, completed=work.completed, failed=work.failed, unanswered=work.unanswered)

    def unfinished(self) -> list[BatchRecord]:
        """Batches that still change, oldest first."""
        return [record for record in [*self.records.values()] if record.is_unfinished]

    def counts(self) -> Mapping[str, int]:
        """Batches by state, for metrics."""
        found: dict[str, int] = {}
        for record in [*self.records.values()]:
            found[record.status] = found.get(record.status, 0) + 1
        return found

    def source(self, record: BatchRecord) -> Path:
        """Where the input of a batch lies.

        Raises
        ------
        FileNotKept
        """
        return self.files.path(self.files.get(record.owner, record.input_file_id))

    def work(self, record: BatchRecord) -> Work:
        """The work on a batch, not open yet.

        Raises
        ------
        FileNotKept
        """
        return Work(self.folder, record.id, self.source(record), self._settings)

    # --- changing ---------------------------------------------------------------------------------------------

    def create(self, record: BatchRecord) -> BatchRecord:
        """Keep a new batch.

        Raises
        ------
        FileNotKept, RequestError, StoreFull, StoreError
        """
        source = self.files.get(record.owner, record.input_file_id)
        if (other := self._needed.get(source.id)) is not None:
            raise RequestError(
                f"The file {source.id} is read by the batch {other}, which has not ended; wait for it or upload the "
                "file again.",
                "input_file_id",
            )
        unfinished = len(self.unfinished())
        if unfinished >= MAX_UNFINISHED:
            raise StoreFull(f"{unfinished} batches have not ended, which is the limit; wait for one, or cancel it.")
        with storing(self.folder, "try again"):
            while len(self.records) >= MAX_BATCHES:
                self._forget(next(each for each in self.records.values() if not each.is_unfinished))
            write(self.folder, record)
        self.records[record.id] = record
        self._needed[source.id] = record.id
        return record

    def forget(self, owner: str, name: str, prefix: str) -> None:
        """Delete a batch that has ended, with its files.

        Raises
        ------
        BatchNotKept, NotCancellable, StoreError
        """
        record = self.get(owner, name, prefix)
        if record.is_unfinished:
            raise NotCancellable(f"The batch {record.id} is {record.status}; cancel it before it is deleted.")
        with storing(self.folder, "try again"):
            self._forget(record)

    def _forget(self, record: BatchRecord) -> None:
        (self.folder / f"{record.id}.json").unlink(missing_ok=True)
        del self.records[record.id]

    def change(self, record: BatchRecord, status: str, **more: Any) -> BatchRecord:
        """Bring a batch into another state, on disk first.

        Raises
        ------
        OSError
        """
        now = int(time.time())
        times = {**record.times, f"{status}_at": now}
        changed = replace(record, status=status, times=times, **more)
        write(self.folder, changed)
        self.records[record.id] = changed
        if not changed.is_unfinished:
            self._needed.pop(record.input_file_id, None)
        return changed
