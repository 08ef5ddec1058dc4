"""Files that clients upload, under the digest of their contents: `sha256:` and 64 hexadecimal digits, nothing else.

    ROOT/sha256-HEX     complete and checked
    ROOT/.HEX.NUMBER    arriving

A name that is no digest never becomes a path (CVE-2024-37032).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from edge_runtime.download import storing
from edge_runtime.errors import DownloadError
from edge_runtime.pulling import SPARE_BYTES
from edge_runtime.server.errors import RequestError, TooLarge
from edge_runtime.sources import is_sha256, visible

PREFIX = "sha256:"
WRITE_BYTES = 4 << 20  # so much is written at once, in a thread


def checked_digest(digest: object) -> str:
    """Return a digest that is one.

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
    root : their folder; made when it is needed.
    most_bytes : of one upload.
    """

    def __init__(self, root: Path, most_bytes: int) -> None:
        self._root, self._most_bytes = root, most_bytes

    def path(self, digest: str) -> Path:
        """Where a file of this digest is, or would be."""
        return self._root / f"sha256-{checked_digest(digest)[len(PREFIX) :]}"

    def has(self, digest: str) -> bool:
        """Whether it is here."""
        return self.path(digest).is_file()

    async def receive(self, digest: str, chunks: AsyncIterator[bytes], announced: int | None) -> None:
        """Store an upload when it is what its digest says; of a cut one nothing is left.

        Parameters
        ----------
        announced : bytes that are to come, where the client told.

        Raises
        ------
        RequestError, TooLarge
            When the contents are others, or too many.
        DownloadError
            When the disk is full or refuses.
        """
        target = self.path(digest)
        self._check_room(announced)
        arriving = self._root / f".{target.name[7:]}.{secrets.token_hex(4)}"
        try:
            found = await self._write(arriving, chunks)
            if found != target.name[7:]:
                raise RequestError(
                    f"The upload has the digest sha256:{found[:16]}..., expected {digest[:23]}...; send it again.",
                    "digest",
                )
            with storing(self._root):
                arriving.replace(target)
        finally:
            with contextlib.suppress(OSError):
                arriving.unlink(missing_ok=True)

    async def _write(self, path: Path, chunks: AsyncIterator[bytes]) -> str:
        digest, held, total = hashlib.sha256(), bytearray(), 0
        with storing(self._root):
            self._root.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:

                def flush() -> None:
                    digest.update(held)
                    file.write(held)
                    held.clear()

                async for chunk in chunks:
                    total += len(chunk)
                    if total > self._most_bytes:
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
        if announced > self._most_bytes:
            raise self._too_large(announced)
        with storing(self._root):
            self._root.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._root).free
        if announced + SPARE_BYTES > free:
            raise DownloadError(
                f"The upload has {announced / 1e9:.2f} GB, the model store has {free / 1e9:.2f} GB free; free some "
                "space, or point EDGE_RUNTIME_MODELS to a folder on another disk."
            )

    def _too_large(self, n_bytes: int) -> TooLarge:
        return TooLarge(f"The upload has {n_bytes} bytes or more, at most {self._most_bytes} are taken.")

    def remove(self, digest: str) -> None:
        """Forget a file."""
        with storing(self._root):
            self.path(digest).unlink(missing_ok=True)
