"""Memory shared by two processes: bytes of files go one way through it, pixels the other.

The process that creates it also sets its size; the other only maps it. On POSIX it is a file without a name (on Linux
in memory only) whose descriptor the other process inherits; on Windows a mapping with a random name, a new one for
each size. Both keep their mapping: a new one would cost a page fault for each 4 KB, as much as copying the pixels.
"""

from __future__ import annotations

import mmap
import os
import secrets
import sys
import tempfile

USUAL_BYTES = 8 << 20
"""Enough for the slices of a picture. Untouched pages take no memory."""


class SharedBuffer:
    """A buffer that this process creates and sizes."""

    def __init__(self) -> None:
        self._tag = ""
        self._descriptor = -1 if sys.platform == "win32" else _unnamed_file()
        self.memory = self._sized(USUAL_BYTES)
        """The memory; a new object after each change of its size."""

    @property
    def n_bytes(self) -> int:
        """Size in bytes."""
        return len(self.memory)

    @property
    def address(self) -> str:
        """How the other process finds it, see `Mapped`."""
        return self._tag if sys.platform == "win32" else str(self._descriptor)

    @property
    def inherited(self) -> tuple[int, ...]:
        """Descriptors that the other process must inherit."""
        return () if self._descriptor < 0 else (self._descriptor,)

    def resize(self, n_bytes: int) -> None:
        """Change the size, not below `USUAL_BYTES`; its contents are lost and their memory is freed."""
        n_bytes = max(n_bytes, USUAL_BYTES)
        if n_bytes != self.n_bytes:
            self.memory.close()
            self.memory = self._sized(n_bytes)

    def _sized(self, n_bytes: int) -> mmap.mmap:
        if sys.platform == "win32":
            self._tag = f"edge-runtime-{secrets.token_hex(8)}"
            return mmap.mmap(-1, n_bytes, tagname=self._tag)
        os.ftruncate(self._descriptor, 0)
        os.ftruncate(self._descriptor, n_bytes)
        return mmap.mmap(self._descriptor, n_bytes)

    def close(self) -> None:
        """Free the memory, unless the other process still maps it."""
        self.memory.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _unnamed_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("edge-runtime", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Mapped:
    """A buffer that another process has created."""

    def __init__(self) -> None:
        self._where: tuple[str, int] | None = None
        self._memory: mmap.mmap | None = None

    def memory(self, address: str, n_bytes: int) -> mmap.mmap:
        """Its memory, at its current size."""
        if self._memory is None or self._where != (address, n_bytes):
            if self._memory is not None:
                self._memory.close()
            if sys.platform == "win32":
                self._memory = mmap.mmap(-1, n_bytes, tagname=address)
            else:
                self._memory = mmap.mmap(int(address), n_bytes)
            self._where = address, n_bytes
        return self._memory
