"""Which file, and which machine: what was computed with one must not be used with another."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

from edge_runtime.weights.gguf_file import GGUFFile

SAMPLE_BYTES = 4096  # of each tensor: a page, so that a file that is not in memory yet is not read as a whole


def file_identity(file: GGUFFile) -> bytes:
    """16 bytes that tell a model file from every other, in milliseconds.

    Made of its length and time of change, all of its header, and a page out of the middle of every tensor: files
    that were unpacked with a fixed time and differ in weights alone are still two files.
    """
    status = file.path.stat()
    digest = hashlib.blake2b(f"{status.st_size} {status.st_mtime_ns}".encode(), digest_size=16)
    with Path(file.path).open("rb") as stream:
        digest.update(stream.read(min((tensor.offset for tensor in file.tensors.values()), default=0)))
        for tensor in file.tensors.values():
            stream.seek(tensor.offset + max(0, tensor.n_bytes - SAMPLE_BYTES) // 2)
            digest.update(stream.read(min(SAMPLE_BYTES, tensor.n_bytes)))
    return digest.digest()


def machine_identity() -> str:
    """What decides speed: processor and its features, cores this process may use, and llama.cpp's version."""
    from edge_kernels.machine import cpu_count, cpu_features, cpu_name

    features = hashlib.blake2b(" ".join(sorted(cpu_features())).encode(), digest_size=4).hexdigest()
    return f"{cpu_name()} {features} x{cpu_count()} llama-cpp-python {metadata.version('llama-cpp-python')}"
