"""Files → one tar file, written as they come and hashed on the way, with a list of checksums at its end.

Owners, dates and modes are fixed, so the same files in the same order make the same bytes. A file is never held in
memory.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import IO

from edge_runtime.errors import BundleError

CHECKSUMS = "SHA256SUMS"
CHUNK_BYTES = 1 << 20
_DATE = 315532800  # 1980-01-01, as in the wheels


class Archive:
    """A tar file that is being written.

    Parameters
    ----------
    file : open for writing bytes.
    top : folder that everything lies in.
    """

    def __init__(self, file: IO[bytes], top: str) -> None:
        self._tar = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.GNU_FORMAT, copybufsize=CHUNK_BYTES)
        self._top = top
        self._lines: list[str] = []

    def add(self, name: str, source: Path | bytes, mode: int = 0o644) -> None:
        """Add a file.

        Raises
        ------
        BundleError
            When its size changes meanwhile.
        OSError
        """
        if isinstance(source, bytes):
            self._add(name, io.BytesIO(source), len(source), mode, name)
            return
        with source.open("rb") as file:
            self._add(name, file, file.seek(0, io.SEEK_END), mode, str(source))

    def _add(self, name: str, file: IO[bytes], size: int, mode: int, source: str) -> None:
        file.seek(0)
        entry = tarfile.TarInfo(f"{self._top}/{name}")
        entry.size, entry.mode, entry.mtime = size, mode, _DATE
        hashed = _Hashed(file)
        try:
            self._tar.addfile(entry, hashed)
        except OSError as error:
            if hashed.n_read < size and error.errno is None:  # tarfile's word for a file that ended early
                raise BundleError(f"{source} became shorter while it was read; make the bundle again.") from None
            raise
        self._lines.append(f"{hashed.digest()}  {name}\n")

    def close(self) -> None:
        """Write the checksums, then the end."""
        data = "".join(self._lines).encode()
        self._add(CHECKSUMS, io.BytesIO(data), len(data), 0o644, CHECKSUMS)
        self._tar.close()


class _Hashed:
    """A file that is hashed as it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self.n_read = file, hashlib.sha256(), 0

    def read(self, n: int = -1) -> bytes:
        data = self._file.read(n)
        self._hash.update(data)
        self.n_read += len(data)
        return data

    def digest(self) -> str:
        return self._hash.hexdigest()
