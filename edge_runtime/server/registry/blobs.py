"""Files that clients upload, under the digest of their contents: `sha256:` and 64 hexadecimal digits, nothing else.

    ROOT/sha256-HEX     complete and checked
    ROOT/.HEX.NUMBER    arriving

A name that is not a digest never becomes a path (CVE-2024-37032).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable, Set
from pathlib import Path

from edge_runtime.errors import StoreError, StoreFull
from edge_runtime.server.errors import RequestError, TooLarge
from edge_runtime.store.download import storing
from edge_runtime.store.names import is_sha256, visible
from edge_runtime.store.pull import SPARE_BYTES
from edge_runtime.system.atomic_files import make_folder, remove_abandoned, unfinished
from edge_runtime.system.plain_files import is_plain

PREFIX = "sha256:"
AGAIN = "send the upload again"
UNNEEDED_AFTER_S = 24 * 3600.0
"""How long an upload is kept without a model that uses it."""
CLOCK_WAS_SET_S = 365 * 24 * 3600.0
_WHOLE, _ARRIVING = re.compile(r"sha256-[0-9a-f]{64}"), re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{8,16}")
WRITE_BYTES = 4 << 20  # written at once, in a thread


def checked_digest(digest: object) -> str:
    """Return a digest if it is valid.

    Raises
    ------
    RequestError
        When it is not.
    """
    text = str(digest)
    number = text[len(PREFIX) :]
    if text[: len(PREFIX)] not in (PREFIX, "sha256-") or not is_sha256(number):
        raise RequestError(
            f"The digest is {visible(text)[:80]!r}; expected sha256: and 64 hexadecimal digits.", "digest"
        )
    return PREFIX + number


class Blobs:
    """The uploads of one store.

    Parameters
    ----------
    root : their folder; created when needed.
    max_bytes : limit of one upload.
    room : returns how many more bytes clients may store.
    """

    def __init__(self, root: Path, max_bytes: int, room: Callable[[], int] = lambda: 1 << 62) -> None:
        self._root, self._max_bytes, self._room = root, max_bytes, room

    def path(self, digest: str) -> Path:
        """Path of the file with this digest, whether it exists or not."""
        return self._root / f"sha256-{checked_digest(digest)[len(PREFIX) :]}"

    def has(self, digest: str) -> bool:
        """Whether it exists. The caller may be about to use it, so its age is reset."""
        path = self.path(digest)
        if not is_plain(path):
            return False
        with contextlib.suppress(OSError):
            os.utime(path)
        return True

    def size(self) -> int:
        """Bytes of all complete and arriving uploads."""
        with contextlib.suppress(OSError), os.scandir(self._root) as files:
            return sum(file.stat(follow_symlinks=False).st_size for file in files)
        return 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing is here, not even an upload without a byte so far."""
        with contextlib.suppress(OSError), os.scandir(self._root) as files:
            return next(files, None) is None
        return True

    async def receive(self, digest: str, chunks: AsyncIterator[bytes], announced: int | None) -> None:
        """Store an upload if it matches its digest; an interrupted one leaves nothing behind.

        Parameters
        ----------
        announced : number of bytes to come, if the client gave it.

        Raises
        ------
        RequestError, TooLarge
            When the contents do not match, or are too large.
        StoreFull
            When clients may not store that much more.
        StoreError
            When the disk is full or cannot be written to.
        """
        target = self.path(digest)
        self._check_room(announced)
        with contextlib.ExitStack() as stack:
            with storing(target, AGAIN):
                make_folder(self._root)
                arriving = stack.enter_context(
                    unfinished(lambda token: self._root / f".{target.name[7:]}.{token}", 0o600)
                )
            found = await self._write(arriving, chunks)
            if found != target.name[7:]:
                raise RequestError(
                    f"The upload has the digest sha256:{found[:16]}..., expected {digest[:23]}...; send it again.",
                    "digest",
                )
            with storing(target, AGAIN):
                arriving.replace(target)

    async def _write(self, path: Path, chunks: AsyncIterator[bytes]) -> str:
        digest, held, total = hashlib.sha256(), bytearray(), 0
        with storing(path, AGAIN), path.open("wb") as file:

            def flush() -> None:
                self._check_quota(len(held))
                digest.update(held)
                file.write(held)
                held.clear()

            async for chunk in chunks:
                total += len(chunk)
                if total > self._max_bytes:
                    raise self._too_large(total)
                held += chunk
                if len(held) >= WRITE_BYTES:
                    await asyncio.to_thread(flush)
            flush()
            await asyncio.to_thread(os.fsync, file.fileno())
        return digest.hexdigest()

    def _check_room(self, announced: int | None) -> None:
        if announced is None:
            return
        if announced > self._max_bytes:
            raise self._too_large(announced)
        self._check_quota(announced)
        with storing(self._root, AGAIN):
            make_folder(self._root)
            free = shutil.disk_usage(self._root).free
        if announced + SPARE_BYTES > free:
            raise StoreError(
                f"The upload has {announced / 1e9:.2f} GB, the model store has {free / 1e9:.2f} GB free; free some "
                "space, or point EDGE_RUNTIME_MODELS to a folder on another disk."
            )

    def _check_quota(self, n_bytes: int) -> None:
        if n_bytes > (room := self._room()):
            raise StoreFull(
                f"The upload does not fit: clients may add another {max(0, room) / 1e9:.2f} GB to the store. "
                "Delete a model, or ask the server's owner for a larger --max-store."
            )

    def _too_large(self, n_bytes: int) -> TooLarge:
        return TooLarge(f"The upload has {n_bytes} bytes or more, at most {self._max_bytes} are accepted.")

    def tidy(self, needed: Set[str] | None, now: float | None = None) -> None:
        """Remove leftovers of interrupted uploads, and files that no name has needed for a while.

        Another server may work in the same folder: what it is writing stays, and so do recent files. Ages of
        more than a year, or in the future, mean that the clock was changed: they are reset.

        Parameters
        ----------
        needed : digests that some name needs; None if unknown: then every file stays.
        now : Unix time.
        """
        kept, now = {self.path(digest).name for digest in needed or ()}, time.time() if now is None else now
        with contextlib.suppress(OSError):  # no folder yet, or not writable: nothing to tidy
            for path in self._root.iterdir():
                if path.is_dir() and not path.is_symlink():
                    continue
                if _ARRIVING.fullmatch(path.name):
                    remove_abandoned([path])
                elif _WHOLE.fullmatch(path.name) and needed is not None and path.name not in kept:
                    age = now - path.lstat().st_mtime
                    if not 0 <= age < CLOCK_WAS_SET_S:
                        os.utime(path, (now, now), follow_symlinks=False)
                    elif age > UNNEEDED_AFTER_S:
                        path.unlink(missing_ok=True)

    def remove(self, digest: str) -> None:
        """Remove a file."""
        with storing(self._root, AGAIN):
            self.path(digest).unlink(missing_ok=True)
