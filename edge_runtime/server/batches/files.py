"""Files that clients upload, and those with answers of batches; see `records` for their places.

An upload is written under a hidden name, counted as it arrives, and renamed when it is whole. Contents without a
record are leftovers and are removed at the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from pathlib import Path

from edge_runtime.errors import StoreError, StoreFull
from edge_runtime.server.batches.records import OWNER_ONLY, FileRecord, new_id, now_ns, read_all, write
from edge_runtime.server.errors import ServerError, TooLarge
from edge_runtime.server.responses_store import owner_of
from edge_runtime.server.settings import Settings
from edge_runtime.store.download import storing
from edge_runtime.store.names import visible
from edge_runtime.system.atomic_files import make_folder, remove_abandoned, unfinished

MAX_FILES = 10_000
"""Of all clients together."""
SPARE_BYTES = 256 << 20
"""That stay free on the disk."""
WRITE_BYTES = 1 << 20
MAX_NAME = 255
AGAIN = "send the file again"
_DATA, _ARRIVING = re.compile(r"(file-[0-9a-f]{32})\.data"), re.compile(r"\.arriving\.[0-9a-f]{16}")


class FileNotKept(ServerError):  # noqa: N818 - says what is the matter
    """No file has this id, or it is another client's."""

    status, param = 404, "id"


class FileInUse(ServerError):  # noqa: N818 - says what is the matter
    """A batch still needs the file."""

    status = 409


class Files:
    """All files of one folder; methods may be called in any thread.

    Parameters
    ----------
    is_needed : whether a batch still reads a file.
    """

    def __init__(self, folder: Path, settings: Settings, is_needed: Callable[[str], bool]) -> None:
        self.folder, self._is_needed = folder, is_needed
        self._most_bytes, self.max_file_bytes = settings.max_files_bytes, settings.max_file_bytes
        self._records: dict[str, FileRecord] = {}
        self._arriving = 0
        """Bytes of uploads that are not whole yet."""
        self._lock = threading.RLock()

    def open(self, kept: Collection[str]) -> None:
        """Read the records, and remove leftovers.

        Parameters
        ----------
        kept : ids of files whose records are about to be written.
        """
        self._records = read_all(self.folder, FileRecord)
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                if _ARRIVING.fullmatch(path.name):
                    remove_abandoned([path])
                elif (found := _DATA.fullmatch(path.name)) and found[1] not in self._records and found[1] not in kept:
                    path.unlink(missing_ok=True)
        for record in [*self._records.values()]:
            if not self.path(record).is_file():
                self._remove(record)

    def path(self, record: FileRecord) -> Path:
        """Where the contents lie."""
        return self.folder / f"{record.id}.data"

    @property
    def n_bytes(self) -> int:
        """Of all files, those that are arriving included."""
        with self._lock:
            return self._arriving + sum(record.n_bytes for record in self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    # --- asking -----------------------------------------------------------------------------------------------

    def get(self, owner: str, name: str) -> FileRecord:
        """A file of this owner.

        Raises
        ------
        FileNotKept
        """
        record = self._records.get(name)
        if record is None or record.owner != owner or self._is_over(record):
            raise FileNotKept(f"No file has the id {visible(name[:80])!r}; ask for the list of files.")
        return record

    def all(self, owner: str, purpose: str | None = None) -> list[FileRecord]:
        """Files of this owner, oldest first."""
        with self._lock:
            records = [*self._records.values()]
        return [
            record
            for record in records
            if record.owner == owner and purpose in (None, record.purpose) and not self._is_over(record)
        ]

    def _is_over(self, record: FileRecord) -> bool:
        is_old = record.expires_at is not None and record.expires_at <= time.time()
        return is_old and not self._is_needed(record.id)

    # --- changing ---------------------------------------------------------------------------------------------

    def delete(self, owner: str, name: str) -> None:
        """Delete a file.

        Raises
        ------
        FileNotKept, FileInUse, StoreError
        """
        with self._lock:
            record = self.get(owner, name)
            if self._is_needed(record.id):
                raise FileInUse(
                    f"The file {record.id} is read by a batch that has not ended; cancel the batch first."
                )
            with storing(self.folder, "try again"):
                self._remove(record, strict=True)

    def delete_all(self, owner: str, names: Collection[str]) -> None:
        """Delete those of these files that there are.

        Raises
        ------
        StoreError
        """
        for name in names:
            with contextlib.suppress(FileNotKept):
                self.delete(owner, name)

    def _remove(self, record: FileRecord, *, strict: bool = False) -> None:
        """Remove the record, then the contents: what is left of the latter goes at the next start."""
        with contextlib.nullcontext() if strict else contextlib.suppress(OSError):
            (self.folder / f"{record.id}.json").unlink(missing_ok=True)
            self._records.pop(record.id, None)
            self.path(record).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove files whose time is over and that no batch needs."""
        with self._lock:
            for record in [*self._records.values()]:
                if self._is_over(record):
                    self._remove(record)

    def put(self, record: FileRecord) -> None:
        """Write the record of contents that are in place.

        Raises
        ------
        OSError
        """
        with self._lock:
            write(self.folder, record)
            self._records[record.id] = record

    @contextlib.contextmanager
    def arriving(self) -> Iterator[Arriving]:
        """A place for an upload; whatever is not kept at the end of the block is removed.

        Raises
        ------
        StoreFull, StoreError
        """
        if len(self) >= MAX_FILES:
            raise StoreFull(f"{len(self)} files are kept here, which is the limit; delete some.")
        with contextlib.ExitStack() as stack:
            with storing(self.folder, AGAIN):
                make_folder(self.folder, 0o700)
                path = stack.enter_context(unfinished(lambda token: self.folder / f".arriving.{token}", OWNER_ONLY))
            found = Arriving(self, path)
            try:
                yield found
            finally:
                self.count(-found.n_bytes)

    def count(self, n_bytes: int) -> None:
        """Count bytes of an upload before they are written.

        Raises
        ------
        StoreFull, StoreError
            When there is no room for them.
        """
        with self._lock:
            if n_bytes > 0:
                self._check_room(n_bytes)
            self._arriving += n_bytes

    def _check_room(self, n_bytes: int) -> None:
        room = self._most_bytes - self.n_bytes
        if n_bytes > room:
            raise StoreFull(
                f"The file does not fit: clients may store another {max(0, room) / 1e6:.1f} MB here. Delete files, "
                "or ask the server's owner for a larger --max-files."
            )
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.folder).free
            if n_bytes + SPARE_BYTES > free:
                raise StoreError(f"The disk has {free / 1e6:.0f} MB free, too little for the file; free some space.")


class Arriving:
    """An upload."""

    def __init__(self, files: Files, path: Path) -> None:
        self._files, self._path = files, path
        self.n_bytes = 0

    async def write(self, chunks: AsyncIterator[bytes]) -> None:
        """Write all of it, in bounded memory.

        Raises
        ------
        TooLarge, StoreFull, StoreError
        """
        held = bytearray()
        with storing(self._path.parent, AGAIN), self._path.open("wb") as file:

            def flush() -> None:
                data = bytes(held)
                held.clear()
                self._files.count(len(data))
                self.n_bytes += len(data)
                file.write(data)

            async for chunk in chunks:
                held += chunk
                if self.n_bytes + len(held) > self._files.max_file_bytes:
                    raise too_large(self._files.max_file_bytes)
                if len(held) >= WRITE_BYTES:
                    await asyncio.to_thread(flush)
            flush()
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())

    def keep(self, owner: str, filename: str, purpose: str, seconds: int | None) -> FileRecord:
        """Make it a file.

        Raises
        ------
        StoreError
        """
        created = now_ns()
        expires_at = None if seconds is None else created // 10**9 + seconds
        name = visible(filename[:MAX_NAME])
        record = FileRecord(new_id("file-"), owner, name, purpose, self.n_bytes, created, expires_at)
        with storing(self._path.parent, AGAIN):
            self._path.replace(self._files.path(record))
            self._files.put(record)
        return record


def owner_of_files(headers: Mapping[str, str], settings: Settings) -> str:
    """Whose files and batches a request may see: of a server with a key there is one owner, whatever the key is."""
    return "" if settings.api_key is not None else owner_of(headers)


def too_large(max_bytes: int) -> TooLarge:
    """The refusal of a file."""
    return TooLarge(f"The file has more than {max_bytes} bytes, which is the limit of this server; split it.")
