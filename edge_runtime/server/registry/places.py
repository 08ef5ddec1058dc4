"""Where the store keeps what clients made: names and uploads. Knows no server, so that commands can look cheaply."""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = ".served"
"""Folder of names and uploads, in the model store."""


def names_folder(store: Path) -> Path:
    """Folder of the records of names."""
    return store / FOLDER / "names"


def record_paths(folder: Path, name: str) -> list[Path]:
    """Paths that the record of a name may have; older versions hashed the name with its case."""
    digests = [hashlib.sha256(each.encode("utf-8", "surrogatepass")).hexdigest() for each in (name.lower(), name)]
    return [folder / f"{digest}.json" for digest in dict.fromkeys(digests)]
