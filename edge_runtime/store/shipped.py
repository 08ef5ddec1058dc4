"""Models that came with this installation: folders that a bundle's install script put there.

    PREFIX/share/edge-runtime/models/NAME/     the two files of a model, and `about.json`

They are found by name, after what was pulled, and never changed. Using them needs no home folder.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import ModelFileError
from edge_runtime.store.names import visible
from edge_runtime.system.text_files import read_json

ABOUT = "about.json"
MAX_ABOUT_BYTES = 1 << 16
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


@dataclass(frozen=True)
class ShippedModel:
    """One of them."""

    name: str
    folder: Path
    source: str = ""
    """Name it was pulled by, or empty."""
    licence: str = ""

    @property
    def files(self) -> list[Path]:
        """Its GGUF files."""
        return sorted(self.folder.glob("*.gguf"))

    @property
    def size(self) -> int:
        """Bytes of these files."""
        return sum(path.stat().st_size for path in self.files)


def shipped_folder() -> Path:
    """Where they are; need not exist."""
    return Path(sys.prefix) / "share" / "edge-runtime" / "models"


def shipped_models() -> list[ShippedModel]:
    """All of them that have both files, by name."""
    try:
        names = sorted(path.name for path in shipped_folder().iterdir())
    except OSError:
        return []
    found = filter(None, map(find_shipped, names))
    return [model for model in found if len(model.files) > 1]


def find_shipped(name: str) -> ShippedModel | None:
    """The model of exactly this name, or None."""
    folder = shipped_folder() / name
    if not NAME.fullmatch(name) or not folder.is_dir():
        return None
    try:
        about = read_json(folder / ABOUT, MAX_ABOUT_BYTES)
    except (OSError, ValueError, RecursionError):
        about = {}
    known = about if isinstance(about, dict) else {}
    return ShippedModel(name, folder, _text(known.get("source")), _text(known.get("licence")))


def _text(value: object) -> str:
    return visible(value)[:200] if isinstance(value, str) else ""


def checked_name(name: str) -> str:
    """Return a name that a model can have in a bundle.

    Raises
    ------
    ModelFileError
    """
    if not NAME.fullmatch(name) or ".." in name or name.endswith(".") or name == "demo":
        raise ModelFileError(
            f"The name {visible(name)[:90]!r} is not possible for a model of a bundle; expected up to 80 letters, "
            "digits, dots, dashes and underscores, and not 'demo': choose one with --name."
        )
    return name
