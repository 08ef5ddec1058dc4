"""Names that clients give → models on this machine: the demo, the owner's, pulled and created ones.

A name is looked up, never opened: only entries of the lists here lead to files. Ollama's clients write
`NAME:latest` for `NAME`, and `hf.co/ORG/REPO` for a repository of the hub. Names are compared without case.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edge_runtime.errors import DownloadError, ModelFileError, StoreFull
from edge_runtime.server.errors import ModelNotFound, NotAllowed, RequestError
from edge_runtime.server.registry.blobs import Blobs
from edge_runtime.server.registry.names import Names, Record, checked_name
from edge_runtime.server.registry.parameters import submit_options
from edge_runtime.server.registry.places import FOLDER, names_folder
from edge_runtime.server.registry.pulled import PulledModels
from edge_runtime.server.settings import Settings
from edge_runtime.store.find import ModelPaths, find_model
from edge_runtime.store.library import Entry, Library
from edge_runtime.store.names import ALIASES, DEMO, LATEST, plain_name, visible
from edge_runtime.store.shipped import shipped_models
from edge_runtime.system.plain_files import is_plain

CHANGES = "names that clients gave"
"""Name of the lock that is held while a name is changed."""
MAX_NAMES_BYTES = 64 << 20
"""Limit for all records together, which are read for every list."""


@dataclass(frozen=True)
class Listed:
    """A model that clients may name."""

    name: str
    """As lists show it, `:latest` left out."""
    paths: ModelPaths
    modified: datetime.datetime
    adapters: Mapping[str, Path] = field(default_factory=dict)
    system: str = ""
    """Put before conversations without a system prompt."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Default options, under Ollama's names."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """Put before every conversation."""
    template: str = ""
    """What a Modelfile gave; shown, not used."""
    license: str = ""
    parent: str = ""
    """What it was made from."""

    @property
    def tag(self) -> str:
        """The name as Ollama's clients expect it: with a tag."""
        return self.name if ":" in self.name else self.name + LATEST

    @property
    def files(self) -> tuple[Path, ...]:
        """All loaded files; names for the same files are the same model."""
        return (self.paths.decoder, self.paths.mmproj, *self.adapters.values())

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def defaults(self) -> dict[str, Any]:
        """Default options, as `Model.submit` takes them."""
        return submit_options(self.parameters)


class Catalog:
    """All models that clients may name.

    Parameters
    ----------
    settings : with the owner's models.
    library : the store; default: the machine's.
    """

    def __init__(self, settings: Settings, library: Library | None = None) -> None:
        self.library = library or Library()
        self.pulled = PulledModels(self.library)
        self.names = Names(names_folder(self.library.root))
        self.blobs = Blobs(self.library.root / FOLDER / "blobs", settings.max_blob_bytes, self.room)
        self._most_bytes, self._most_names = settings.max_stored_bytes, settings.max_names
        self._owned: dict[str, Listed] = {}
        for name in (DEMO, *(model.name for model in shipped_models()), *settings.models):
            paths = find_model(name)
            known = self._owned.setdefault(
                plain_name(paths.name).lower(), Listed(paths.name, paths, _modified(paths.decoder))
            )
            if known.files != (paths.decoder, paths.mmproj):
                raise ModelFileError(
                    f"Two models would be called {paths.name} (names are compared without case); give the folder or "
                    "file of one another name."
                )
        self.default = plain_name(find_model(settings.models[0]).name) if settings.models else DEMO

    def tidy(self) -> None:
        """Remove interrupted uploads, and those that no name has needed for a day."""
        if self.blobs.is_empty:
            return
        # A read-only store stays as it is.
        with contextlib.suppress(DownloadError), self._changing():
            self.blobs.tidy(self.names.needed())

    def room(self) -> int:
        """Bytes that clients may add to the store."""
        return self._most_bytes - self.blobs.size() - sum(entry.size for entry in self.library.entries())

    def is_owned(self, name: str) -> bool:
        """Whether a name is the demo's or one that the owner gave: clients cannot delete it."""
        return plain_name(name).lower() in self._owned

    def _changing(self) -> AbstractContextManager[None]:
        """Lock the names, for this process and others: files are removed with their last name."""
        return self.library.lock(CHANGES, lambda: None)

    def all(self) -> list[Listed]:
        """Every model that can be used, by name."""
        found = dict(self._owned)
        records = {record.name.lower(): record for record in self.names.all()}
        for key, record in records.items():
            listed = self._made(record)
            if listed is not None:
                found.setdefault(key, listed)
        for entry in self.pulled.all():
            if entry.label.lower() not in records and (listed := self._stored(entry)) is not None:
                found.setdefault(listed.name.lower(), listed)
        return sorted(found.values(), key=lambda listed: listed.name.lower())

    def owned(self, name: str) -> Listed:
        """A model by the name the owner gave at the start, which may be a path."""
        return self._owned[plain_name(find_model(name).name).lower()]

    def find(self, name: str | None) -> Listed:
        """The model of this name; None takes the default.

        Raises
        ------
        ModelNotFound
            When there is none.
        """
        wanted = plain_name(name) if name else self.default
        listed = self._find(wanted)
        if listed is None:
            raise ModelNotFound(f"model '{visible(wanted)[:120]}' not found, try pulling it first")
        return listed

    def _find(self, wanted: str) -> Listed | None:
        if wanted.lower() in self._owned:
            return self._owned[wanted.lower()]
        record = self.names.get(wanted)
        if record is not None:
            return self._made(record)
        entry = self.pulled.find(wanted)
        if entry is None or ((hidden := self.names.get(entry.label)) is not None and hidden.hidden):
            return None
        return self._stored(entry)

    def copy(self, source: str, destination: str) -> None:
        """Give a model another name.

        Raises
        ------
        ModelNotFound, RequestError
            When there is no such model, or the new name is not allowed.
        """
        self.put(replace(self.record_of(source), created=_now()), destination)

    def record_of(self, name: str) -> Record:
        """The record of a model, to be changed.

        Raises
        ------
        ModelNotFound
        """
        listed = self.find(name)
        record = self.names.get(plain_name(name))
        if record is not None and listed.name == record.name:
            return record
        entry = None if listed.name.lower() in self._owned else self.pulled.find(listed.name)
        return Record(listed.name, base=listed.name if entry is None else entry.name)

    def put(self, record: Record, name: str) -> Record:
        """Write a record under a client's name.

        Raises
        ------
        RequestError
            When the name is the owner's, a built-in alias, or invalid.
        StoreFull
            When clients have made as many models as they may.
        """
        name = checked_name(plain_name(name))
        if name.lower() in self._owned or name.lower() in ALIASES:
            raise RequestError(f"{name} is the name of a model that clients cannot replace; choose another one.")
        with self._changing():
            return self._put(record, name)

    def _put(self, record: Record, name: str) -> Record:
        old = self.names.get(name)
        n_names, n_bytes = self.names.size()
        if (old is None and n_names >= self._most_names) or n_bytes > MAX_NAMES_BYTES:
            raise StoreFull(
                f"There are {n_names} models that clients made, with {n_bytes / 1e6:.0f} MB of texts; at most "
                f"{self._most_names} and {MAX_NAMES_BYTES / 1e6:.0f} MB are kept. Delete one first."
            )
        record = replace(record, name=name if old is None else old.name, hidden=False)
        if self._made(record) is None:
            raise RequestError(f"The files of {name} are not all here; upload or pull them first.")
        self.names.put(record)
        if old is not None:
            self._let_go(old)
        return record

    def delete(self, name: str) -> Listed | None:
        """Delete a name; files that no other name needs are removed from the disk.

        Returns
        -------
        listed : the deleted model, if it was usable.

        Raises
        ------
        ModelNotFound
            When no model has this name.
        NotAllowed
            When it is the owner's.
        """
        wanted = plain_name(name)
        if wanted.lower() in self._owned:
            raise NotAllowed(
                f"{wanted} was given by the owner of this server, or is part of it; clients cannot delete it."
            )
        with self._changing():
            return self._delete(name, wanted)

    def _delete(self, name: str, wanted: str) -> Listed | None:
        record = self.names.get(wanted)
        listed = self.find(name) if record is None else self._made(record)
        if record is not None:
            if record.hidden:
                raise ModelNotFound(f"model '{visible(wanted)[:120]}' not found")
            self.names.remove(record.name)
            self._let_go(record)
            return listed
        entry = self.pulled.find(wanted)
        assert entry is not None, "what is neither the owner's nor created was pulled"
        if any(other.base == entry.name for other in self.names.all()):
            self.names.put(Record(entry.label, base=entry.name, hidden=True, created=_now()))
        else:
            self.library.remove(entry)
        return listed

    def unhide(self, entry: Entry) -> None:
        """List a pulled model again, after another pull."""
        with self._changing():
            record = self.names.get(entry.label)
            if record is not None and record.hidden:
                self.names.remove(entry.label)

    def _let_go(self, record: Record) -> None:
        """Remove what only this record needed."""
        others = self.names.all()
        for digest in record.digests - set().union(*(other.digests for other in others)):
            self.blobs.remove(digest)
        of_base = [other for other in others if other.base == record.base]
        if record.base and of_base and all(other.hidden for other in of_base):
            entry = self.library.entry(record.base)
            if entry is not None:
                self.library.remove(entry)
            for other in of_base:
                self.names.remove(other.name)

    def _stored(self, entry: Entry) -> Listed | None:
        """A pulled model; None if its files were removed by somebody else."""
        try:
            paths = find_model(entry.name)
            return Listed(entry.label, paths, _modified(paths.decoder), license=entry.licence)
        except (ModelFileError, OSError):
            return None

    def _made(self, record: Record) -> Listed | None:
        """A model that a client made; None if a file of it is missing."""
        base = self._base(record.base) if record.base else None
        decoder = base.paths.decoder if base is not None else None
        mmproj = base.paths.mmproj if base is not None else None
        decoder = self.blobs.path(record.decoder) if record.decoder else decoder
        mmproj = self.blobs.path(record.mmproj) if record.mmproj else mmproj
        adapters = {digest: self.blobs.path(digest) for digest in record.adapters}
        if record.hidden or decoder is None or mmproj is None:
            return None
        if not all(map(is_plain, map(self.blobs.path, record.digests))):
            return None
        if not all(path.is_file() for path in (decoder, mmproj)):
            return None
        return Listed(
            record.name,
            ModelPaths(record.name, decoder, mmproj),
            datetime.datetime.fromisoformat(record.created),
            adapters,
            record.system,
            record.parameters,
            record.messages,
            record.template,
            record.license or (base.license if base else ""),
            record.parent,
        )

    def _base(self, name: str) -> Listed | None:
        if name.lower() in self._owned:
            return self._owned[name.lower()]
        entry = self.library.entry(name)
        return self._stored(entry) if entry is not None and entry.complete else None


def _modified(path: Path) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat()
