"""Identity of a model file: what was computed with one file must not be used with another."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edge_runtime.weights.gguf_file import GGUFFile

SAMPLE_BYTES = 4096  # of each tensor: a page, so that a file that is not in the page cache yet is not read as a whole


def file_identity(file: GGUFFile) -> bytes:
    """16 bytes that identify a model file, computed in milliseconds.

    A digest of its length, its modification time, its whole header, and a page from the middle of every tensor: files
    that were unpacked with a fixed time and differ only in their weights still get different identities.
    """
    status = file.path.stat()
    digest = hashlib.blake2b(f"{status.st_size} {status.st_mtime_ns}".encode(), digest_size=16)
    with Path(file.path).open("rb") as stream:
        digest.update(stream.read(min((tensor.offset for tensor in file.tensors.values()), default=0)))
        for tensor in file.tensors.values():
            stream.seek(tensor.offset + max(0, tensor.n_bytes - SAMPLE_BYTES) // 2)
            digest.update(stream.read(min(SAMPLE_BYTES, tensor.n_bytes)))
    return digest.digest()
