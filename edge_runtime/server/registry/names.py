"""Models that clients made: names for files that are here, with their own prompts and options.

    ROOT/HASH.json     one record, replaced atomically

Names are compared without case, as Ollama does, and shown as they were first written.
A record refers to its parts by name or by digest, never by path. A copy is another name for the same files; the
files are removed with the last name. A pulled model whose name is deleted while others need its files is only hidden.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from edge_runtime.errors import ModelFileError
from edge_runtime.server.errors import RequestError
from edge_runtime.server.registry.blobs import checked_digest
from edge_runtime.server.registry.places import record_paths
from edge_runtime.store.download import storing
from edge_runtime.store.names import ollama_parts
from edge_runtime.system.atomic_files import write_whole
from edge_runtime.system.plain_files import open_plain

FORMAT = 1
MAX_RECORD_BYTES = 4 << 20


@dataclass(frozen=True)
class Record:
    """One name."""

    name: str
    base: str = ""
    """Name of the owner's or of a pulled model whose files these are; empty if they were uploaded."""
    decoder: str = ""
    """Digest of an uploaded file; `mmproj` likewise."""
    mmproj: str = ""
    adapters: tuple[str, ...] = ()
    """Digests."""
    parent: str = ""
    """What it was made from, as the client said."""
    system: str = ""
    template: str = ""
    """For display only; prompts use the template in the model's own file."""
    license: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Options in Ollama's words."""
    messages: tuple[Mapping[str, Any], ...] = ()
    created: str = "1970-01-01T00:00:00+00:00"
    """ISO 8601."""
    hidden: bool = False
    """Whether the name was deleted, and only others need the files."""

    @property
    def digests(self) -> set[str]:
        """All uploaded files."""
        return {digest for digest in (self.decoder, self.mmproj, *self.adapters) if digest}


class Names:
    """The records of one store."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def all(self) -> list[Record]:
        """Every record that can be read."""
        try:
            paths = sorted(self._root.glob("*.json"))
        except OSError:
            return []
        found = [self._read(path) for path in paths]
        return [
            record
            for path, record in zip(paths, found, strict=True)
            if record and path in record_paths(self._root, record.name)
        ]

    def needed(self) -> set[str] | None:
        """Digests that the records need; None if a record cannot be read, which may need any."""
        records = self.all()
        try:
            is_all = len(records) == len([*self._root.glob("*.json")])
        except OSError:
            is_all = False
        return {digest for record in records for digest in record.digests} if is_all else None

    def get(self, name: str) -> Record | None:
        """The record of a name, whatever its case."""
        for path in record_paths(self._root, name):
            record = self._read(path)
            if record is not None and record.name.lower() == name.lower():
                return record
        return None

    def put(self, record: Record) -> None:
        """Write a record atomically."""
        path = self._path(record.name)
        text = json.dumps({"format": FORMAT, **asdict(record)}, ensure_ascii=False, indent=1)
        if len(text.encode("utf-8", "surrogatepass")) > MAX_RECORD_BYTES:
            raise RequestError("The model's texts have more than 4 MB; shorten its system prompt or messages.")
        with storing(self._root, "make the model again"):
            write_whole(path, text.encode("utf-8", "replace"), mode=0o600)  # it may hold private messages
            for other in record_paths(self._root, record.name)[1:]:
                other.unlink(missing_ok=True)

    def size(self) -> tuple[int, int]:
        """How many names there are, and their bytes."""
        with contextlib.suppress(OSError), os.scandir(self._root) as files:
            sizes = [file.stat(follow_symlinks=False).st_size for file in files if file.name.endswith(".json")]
            return len(sizes), sum(sizes)
        return 0, 0

    def remove(self, name: str) -> None:
        """Delete a name."""
        with storing(self._root):
            for path in record_paths(self._root, name):
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return record_paths(self._root, name)[0]

    def _read(self, path: Path) -> Record | None:
        """A record, checked; None if there is none of this version."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError, RequestError):
            with open_plain(path) as file:
                value = json.loads(file.read(MAX_RECORD_BYTES + 1))
            if value.pop("format") == FORMAT:
                return _checked(Record(**value))
        return None


def _checked(record: Record) -> Record:
    """Return a record if its fields have the right types: records are as untrusted as any file."""
    for each in fields(record):
        value = getattr(record, each.name)
        expected: tuple[type, ...] = {"parameters": (dict,), "messages": (list, tuple), "hidden": (bool,)}.get(
            each.name, (list, tuple) if each.name == "adapters" else (str,)
        )
        if not isinstance(value, expected):
            raise TypeError(each.name)
    for digest in record.digests:
        checked_digest(digest)
    if not all(isinstance(message, dict) for message in record.messages):
        raise TypeError("messages")
    datetime.datetime.fromisoformat(record.created)
    values = vars(record) | {"adapters": tuple(record.adapters), "messages": tuple(record.messages)}
    return Record(**values)


def checked_name(name: str) -> str:
    """Return a name that a client may give to a model of its own, `:latest` left out.

    Raises
    ------
    RequestError
        When Ollama would not accept it either.
    """
    try:
        ollama_parts(name)
    except ModelFileError:
        raise RequestError(
            f"The name {name[:80]!r} is not allowed; expected letters, digits, '.', '-' and '_', optionally followed "
            "by ':TAG'.",
            "model",
        ) from None
    return name[: -len(":latest")] if name.lower().endswith(":latest") else name
