"""What is kept on disk of a file or a batch besides its lines: one JSON object each, replaced atomically.

    ROOT/files/ID.json      what clients are told of a file       ROOT/files/ID.data    its contents
    ROOT/batches/ID.json    a batch
    ROOT/batches/ID.output  lines with answers, as they come      ROOT/batches/ID.errors   those that have none

Ids are made here, 128 random bits each; one that a client names is looked up among them, and never becomes a path.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from edge_runtime.system.atomic_files import write_whole
from edge_runtime.system.plain_files import open_plain

FORMAT = 1
MAX_RECORD_BYTES = 4 << 20
OWNER_ONLY = 0o600
"""They hold private messages."""
_ID = re.compile(r"(file-|batch_|msgbatch_)[0-9a-f]{32}")

UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
"""States of batches that still change."""


@dataclass(frozen=True)
class FileRecord:
    """A file."""

    id: str
    owner: str
    """See `owner_of`; empty: whoever may use the server."""
    filename: str
    """As the client calls it; only shown."""
    purpose: str
    n_bytes: int
    created_ns: int
    """Unix time."""
    expires_at: int | None = None
    """Unix time."""

    @property
    def created_at(self) -> int:
        """Unix time."""
        return self.created_ns // 10**9


@dataclass(frozen=True)
class BatchRecord:
    """A batch; states and names of times are OpenAI's."""

    id: str
    owner: str
    endpoint: str
    """Route that answers its lines."""
    input_file_id: str
    completion_window: str
    created_ns: int
    expires_at: int
    status: str = "validating"
    times: Mapping[str, int] = field(default_factory=dict)
    """Unix time of each state that it has reached: `in_progress_at` and so on."""
    metadata: Mapping[str, str] | None = None
    errors: tuple[Mapping[str, Any], ...] = ()
    """Why it failed."""
    model: str | None = None
    """That its lines ask; None: the default, or not known yet."""
    total: int = 0
    completed: int = 0
    """Lines with answers; while the batch is in progress, as of the last start of the server."""
    failed: int = 0
    """Lines with errors."""
    unanswered: int = 0
    """Of these, lines that nobody tried to answer any more: the batch was cancelled, or expired."""
    output_file_id: str | None = None
    error_file_id: str | None = None
    output_seconds: int | None = None
    """How long the files with its answers are kept; None: as long as clients want them."""
    ends_as: str = ""
    """State after `finalizing` or `cancelling`."""

    @property
    def created_at(self) -> int:
        """Unix time."""
        return self.created_ns // 10**9

    @property
    def is_unfinished(self) -> bool:
        """Whether it still changes."""
        return self.status in UNFINISHED


Record = TypeVar("Record", FileRecord, BatchRecord)


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return f"{prefix}{secrets.token_hex(16)}"


_last_ns = 0


def now_ns() -> int:
    """Unix time; later than that of every earlier call, so that records have an order."""
    global _last_ns
    _last_ns = max(time.time_ns(), _last_ns + 1)
    return _last_ns


def write(folder: Path, record: FileRecord | BatchRecord) -> None:
    """Write a record atomically.

    Raises
    ------
    OSError
    """
    text = json.dumps({"format": FORMAT, **asdict(record)}, indent=1)
    write_whole(folder / f"{record.id}.json", text.encode(), OWNER_ONLY)


def read_all(folder: Path, kind: type[Record]) -> dict[str, Record]:
    """All records of a folder by id, oldest first, without those that cannot be read."""
    try:
        paths = [path for path in folder.iterdir() if path.suffix == ".json" and _ID.fullmatch(path.stem)]
    except OSError:
        return {}
    found = [record for path in paths if (record := _read(path, kind)) is not None]
    return {record.id: record for record in sorted(found, key=lambda record: record.created_ns)}


def _read(path: Path, kind: type[Record]) -> Record | None:
    """A record; None when it is damaged or of another version."""
    try:
        with open_plain(path) as file:
            raw = file.read(MAX_RECORD_BYTES + 1)
        value = json.loads(raw)
        if value.pop("format") != FORMAT or value["id"] != path.stem:
            return None
        known = {each.name for each in fields(kind)}
        given: dict[str, Any] = {name: value[name] for name in known & value.keys()}
        record = kind(**given)
        return record if isinstance(record.created_ns, int) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
