"""A file in memory without reading it: mapped, with a sentence for everything that may be wrong with it."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_runtime.errors import ModelFileError

Bytes = npt.NDArray[np.uint8]


def map_file(path: Path) -> Bytes:
    """Map a file read-only, with a sentence for everything that may be wrong with the path."""
    try:
        if path.is_dir():
            raise ModelFileError(f"{path} is a folder, expected a GGUF file; name the file inside it.")
        size = path.stat().st_size
        if size < 24:  # magic, version, two counts
            raise ModelFileError(
                f"{path.name} has {size} bytes, too few for a GGUF file; download or convert it again."
            )
        return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    except FileNotFoundError:
        raise ModelFileError(f"The model file {path} does not exist; check the path.") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        raise ModelFileError(
            f"The model file {str(path)!r} cannot be read: {reason}; check the path and its permissions."
        ) from None


def let_go(data: Bytes) -> None:
    """Take the pages of a mapped file out of this process, where the system can; the file stays in its cache.

    Parameters
    ----------
    data : from `map_file`.
    """
    mapped = getattr(data.base, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
