"""The model store of this machine: pulled models, as folders in the user's data directory.

    ROOT/                        EDGE_RUNTIME_MODELS, or `models` in the user's data directory
      SLUG-HASH/                 one model; the hash of its name keeps names apart on any file system
        model.json               the record, replaced atomically when everything is there; see `Entry`
        SNAPSHOT/LABEL/          the files of one version; the record says which snapshot counts
      .locks/                    one process at a time may change a model; reading needs no lock

A record is as untrusted as any file: every path in it is checked before it is joined to a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from edge_runtime.errors import DownloadError, ModelFileError
from edge_runtime.store.download import storing
from edge_runtime.store.names import ALIASES, Source, checked_path, is_meant, parse_source, visible
from edge_runtime.system.atomic_files import make_folder, write_whole
from edge_runtime.system.plain_files import open_plain
from edge_runtime.system.user_folders import user_folder

RECORD, LOCKS = "model.json", ".locks"
MAX_RECORD_BYTES = 1 << 20
FORMAT = 1
WAIT_S = 1.0
"""Between two tries to take a lock that another process holds."""


@dataclass(frozen=True)
class StoredFile:
    """One file of a model."""

    path: str
    """Relative to the snapshot."""
    size: int
    digest: str = ""
    """As the server announced it and the file was verified; empty: it announced none."""


@dataclass(frozen=True)
class Entry:
    """One model of the store."""

    name: str
    """As `Source.name` spells it."""
    kind: Literal["gguf", "checkpoint", "ollama"]
    snapshot: str = ""
    files: tuple[StoredFile, ...] = ()
    decoder: str = ""
    """Path of the decoder among the files; `mmproj` likewise."""
    mmproj: str = ""
    revision: str = ""
    licence: str = ""
    pulled: str = ""
    """Date, ISO 8601."""
    complete: bool = False

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def decoder_digest(self) -> str:
        """Digest of the decoder; empty if the server announced none."""
        return next((file.digest for file in self.files if file.path == self.decoder), "")

    @property
    def label(self) -> str:
        """What people call it: its alias, or its name."""
        return next((alias for alias in ALIASES if self._is_named(alias)), self.name)

    def _is_named(self, alias: str) -> bool:
        source = parse_source(alias)
        assert source is not None
        same_place = (source.kind, source.place) == (self.source.kind, self.source.place)
        return same_place and is_meant(self.source.file, source)

    @property
    def source(self) -> Source:
        """Where it came from."""
        source = parse_source(self.name)
        if source is None:
            raise ModelFileError(
                f"{visible(self.name)!r} names no source of models; expected a name such as hf:ORG/REPO."
            )
        return source


class Library:
    """The store.

    Parameters
    ----------
    root : its folder; default: EDGE_RUNTIME_MODELS, or `models` in the user's data directory.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        from platformdirs import user_data_path

        chosen = root or os.environ.get("EDGE_RUNTIME_MODELS")
        of_user = user_folder(lambda: user_data_path("edge-runtime", appauthor=False))
        self.root = Path(chosen) if chosen else of_user / "models"

    def folder(self, name: str) -> Path:
        """Folder of a model: directly in the root, whatever characters the name holds."""
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80]
        return self.root / f"{slug}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"

    def snapshot(self, entry: Entry) -> Path:
        """Folder with the files of a model, named after its repository: converters take names from folders."""
        label = re.sub(r"[^A-Za-z0-9_-]+", "-", entry.source.place.rpartition("/")[2].removesuffix(".gguf"))
        return self.folder(entry.name) / entry.snapshot / label[:80]

    def entries(self) -> list[Entry]:
        """All models, complete or not, by name; damaged records are left out, and pulling again replaces them."""
        found = []
        try:
            folders = list(self.root.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _unreadable(self.root, error) from None
        for folder in folders:
            with contextlib.suppress(ModelFileError):
                entry = self._read(folder)
                if entry is not None and self.folder(entry.name) == folder:
                    found.append(entry)
        return sorted(found, key=lambda entry: entry.name.lower())

    def entry(self, name: str) -> Entry | None:
        """The record with exactly this name, or None.

        Raises
        ------
        ModelFileError
            When the record is damaged.
        """
        return self._read(self.folder(name))

    def find(self, source: Source) -> Entry | None:
        """The model a name means: exactly that one, or the only match in its repository, complete ones first.

        Raises
        ------
        ModelFileError
            When several match; names them.
        """
        exact = self.entry(source.name)
        if exact is not None and exact.complete:
            return exact
        fitting = [
            entry
            for entry in self.entries()
            if (entry.source.kind, entry.source.place) == (source.kind, source.place)
            and (not source.file or is_meant(entry.decoder, source))
        ]
        found = [entry for entry in fitting if entry.complete] or fitting
        if len({(source.file and entry.decoder_digest) or entry.name for entry in found}) > 1:
            names = ", ".join(entry.name for entry in found)
            raise ModelFileError(f"{source.name} may mean any of {names}; expected one of these names.")
        return found[0] if found else None

    def write(self, entry: Entry) -> None:
        """Replace the record atomically."""
        path = self.folder(entry.name) / RECORD
        with storing(path):
            write_whole(path, json.dumps({"format": FORMAT, **asdict(entry)}, indent=1).encode())

    def remove(self, entry: Entry) -> int:
        """Remove a model and everything fetched for it.

        Returns
        -------
        freed : bytes.

        Raises
        ------
        DownloadError
            When another process is pulling it, or the files cannot be removed.
        """

        def busy() -> None:
            raise DownloadError(f"{entry.name} is being pulled by another process; end that process first.")

        folder = self.folder(entry.name)
        with self.lock(entry.name, busy), storing(folder):
            # Without its record, a half-removed model counts as unfinished, not as damaged.
            (folder / RECORD).unlink(missing_ok=True)
            freed = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
            if folder.is_symlink():
                folder.unlink()
            else:
                shutil.rmtree(folder)
        return freed

    @contextlib.contextmanager
    def lock(self, name: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the lock for changing a model; it is released when the process ends, too.

        Parameters
        ----------
        on_wait : called now and then while another process holds it; may raise instead of waiting.
        """
        from filelock import FileLock, Timeout

        folder = self.root / LOCKS
        with storing(folder):
            make_folder(folder)
            lock = FileLock(folder / f"{self.folder(name).name}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                while not lock.is_locked:
                    on_wait()
                    with contextlib.suppress(Timeout):
                        lock.acquire(timeout=WAIT_S)
        try:
            yield
        finally:
            lock.release()

    def _read(self, folder: Path) -> Entry | None:
        record = folder / RECORD
        try:
            with open_plain(record) as file:
                raw = file.read(MAX_RECORD_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _unreadable(record, error) from None
        return parse_record(raw, record)


def _unreadable(path: Path, error: OSError) -> ModelFileError:
    return ModelFileError(f"{path} cannot be read: {error.strerror or error}; check its permissions.")


def parse_record(raw: bytes, where: Path) -> Entry:
    """Read a record, checking everything in it.

    Raises
    ------
    ModelFileError
        When it is not a record that this version writes.
    """
    try:
        value = json.loads(raw) if len(raw) <= MAX_RECORD_BYTES else None
        entry = _entry(value)
        _check_paths(entry)
    except (ValueError, TypeError, KeyError, RecursionError, ModelFileError):
        raise ModelFileError(f"The record {where} is damaged or of another version; pull the model again.") from None
    return entry


def _entry(value: Any) -> Entry:
    if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
        raise ValueError
    files = tuple(StoredFile(**file) for file in value.pop("files"))
    entry = Entry(**value, files=files)
    texts = [getattr(entry, field.name) for field in fields(entry) if field.name not in ("files", "complete")]
    texts += [text for file in files for text in (file.path, file.digest)]
    if not all(isinstance(text, str) and text.isprintable() for text in texts) or type(entry.complete) is not bool:
        raise ValueError
    if not all(type(file.size) is int and file.size >= 0 for file in files):
        raise ValueError
    if entry.kind not in ("gguf", "checkpoint", "ollama"):
        raise ValueError
    return entry


def _check_paths(entry: Entry) -> None:
    """No path of a record may lead out of its folder."""
    if entry.source.name != entry.name:
        raise ValueError
    paths = {checked_path(file.path) for file in entry.files}
    if entry.snapshot and not re.fullmatch(r"[0-9a-f]{12}", entry.snapshot):
        raise ValueError
    if (entry.files or entry.decoder or entry.mmproj) and not entry.snapshot:
        raise ValueError
    if not {entry.decoder, entry.mmproj} - {""} <= paths or len(paths) != len(entry.files):
        raise ValueError
