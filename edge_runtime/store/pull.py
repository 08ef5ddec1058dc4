"""A model's name → its files in the store: list, choose, make sure of the space, fetch, check, record.

The files of one version lie in a snapshot of their own, and the record is replaced when all of them are there and
sound. So a pull that is cut leaves the store as it was, an update leaves the running model alone, and the next pull
goes on with what has arrived.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edge_runtime.errors import ModelFileError, StoreError, StoreFull
from edge_runtime.store import ollama
from edge_runtime.store.download import RemoteFile, download, part_of, storing
from edge_runtime.store.hubs import Choice, Listing, choose, endpoint_of, list_files
from edge_runtime.store.library import Entry, Library, StoredFile
from edge_runtime.store.names import Source, parse_source, visible
from edge_runtime.system.addresses import Allowed, FetchPolicy, enforced
from edge_runtime.system.atomic_files import make_folder
from edge_runtime.weights.config import check_mmproj, decoder_config, resampler_config, slicing_config, vision_config
from edge_runtime.weights.gguf_file import GGUFFile

Progress = Callable[[str, int, int], None]
"""(file, bytes that are there, bytes in all)"""

SPARE_BYTES = 64 << 20
"""Left free on the disk beside what is fetched."""


@dataclass(frozen=True)
class Plan:
    """What a pull is about to do."""

    entry: Entry
    fetched: int
    """Bytes to fetch; less than the size where something is here already."""
    folder: Path


def pull(
    name: str,
    *,
    mmproj: str | None = None,
    progress: Progress = lambda what, done, total: None,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    on_wait: Callable[[], None] = lambda: None,
    library: Library | None = None,
    allowed: Sequence[Allowed] | None = None,
    most_bytes: int | None = None,
) -> Entry:
    """Bring a model into the store.

    Parameters
    ----------
    name : see `sources`.
    mmproj : the mmproj file when it is not the usual one: a name in the repository, or the second address.
    progress : called while bytes arrive.
    on_plan : called once it is known what will be fetched.
    on_wait : called now and then while another process is pulling the same model; its end is awaited.
    allowed : what the owner of a server lets its clients have fetched; hubs are allowed beside it. None: it is the
        owner who asks, and may name any address.
    most_bytes : that may be fetched.

    Raises
    ------
    ModelFileError
        When the name is none, or a file is no model that runs here.
    DownloadError
        When something cannot be fetched or stored. What has arrived is kept for the next time.
    AddressRefused
        When it is, or leads to, an address that may not be reached; nothing was sent there then.
    """
    source, library = _source(name), library or Library()
    policy = None if allowed is None else FetchPolicy(tuple(allowed), endpoint_of(source))
    if source.kind == "ollama":
        if mmproj is not None:
            raise ModelFileError(f"{name} has an mmproj file of its own; expected no --mmproj here, but for 'run'.")
        return _link(source, library, progress)
    with enforced(policy):
        listing = list_files(source, mmproj)
        choice = choose(source, listing, mmproj if source.kind != "url" else None)
        entry = _describe(source, listing, choice)
        with library.lock(entry.name, on_wait):
            return _Pull(library, entry, choice, progress).run(on_plan, most_bytes)


def fetch_checkpoint(name: str, progress: Progress, on_plan: Callable[[Plan], None]) -> tuple[Path, str]:
    """Folder with a checkpoint and what to call it: a folder is taken as it is, a name of a hub is pulled first.

    Raises
    ------
    DownloadError, ModelFileError
        As for `pull`; also when the repository holds GGUF files, which need no conversion.
    """
    source = parse_source(name)
    if source is None:
        return Path(name), Path(name).resolve().name
    if source.kind not in ("hf", "ms"):
        raise ModelFileError(f"{source.name} is no checkpoint; expected a folder, hf:ORG/REPO or ms:ORG/REPO.")
    library = Library()
    entry = library.find(source)
    if entry is None or not entry.complete:
        entry = pull(name, progress=progress, on_plan=on_plan, library=library)
    if entry.kind != "checkpoint":
        raise ModelFileError(
            f"{entry.name} holds GGUF files already, expected a checkpoint; use it with 'edge-runtime run -m "
            f"{entry.name}'."
        )
    return library.snapshot(entry), source.place.partition("/")[2]


def check_model_file(path: Path) -> tuple[str, int]:
    """Check a GGUF file as it will be before llama.cpp or a kernel sees it.

    Returns
    -------
    role : `decoder` or `mmproj`.
    hidden : width of the decoder, or of the visual tokens.

    Raises
    ------
    ModelFileError
        When it is damaged or of a model that does not run here.
    """
    file = GGUFFile(path)
    if file.metadata.get("general.architecture") != "clip":
        return "decoder", decoder_config(file).hidden
    check_mmproj(file)
    vision_config(file)
    slicing_config(file)
    return "mmproj", resampler_config(file).hidden


def _source(name: str) -> Source:
    source = parse_source(name)
    if source is None:
        raise ModelFileError(
            f"{visible(name)[:120]!r} names nothing to pull; expected minicpm-v-4.5, hf:ORG/REPO, ms:ORG/REPO, "
            "ollama:NAME or an https address of a .gguf file."
        )
    return source


def _link(source: Source, library: Library, progress: Progress) -> Entry:
    """Check a model of the Ollama store, and remember it; its files stay where they are."""
    model = ollama.verify(source.place, progress)
    check_roles({"decoder": model.decoder.path, "mmproj": model.mmproj.path})
    entry = Entry(source.name, "ollama", pulled=_today(), complete=True)
    library.write(entry)
    return entry


def _describe(source: Source, listing: Listing, choice: Choice) -> Entry:
    """The record as it will be; a file is part of the name, so that two decoders of one repository are two models."""
    if choice.kind == "gguf" and source.kind != "url" and choice.decoder is not None:
        source = replace(source, file=choice.decoder.path)
    versions = sorted(f"{file.path}\0{file.digest or file.version}\0{file.size}" for file in choice.files)
    return Entry(
        source.name,
        choice.kind,
        snapshot=hashlib.sha256("\n".join(versions).encode()).hexdigest()[:12],
        files=tuple(StoredFile(file.path, file.size or 0, file.digest) for file in choice.files),
        decoder=choice.decoder.path if choice.decoder else "",
        mmproj=choice.mmproj.path if choice.mmproj else "",
        revision=listing.revision,
        licence=listing.licence,
        pulled=_today(),
    )


class _Pull:
    """One pull of one model, by the process that holds its lock."""

    def __init__(self, library: Library, entry: Entry, choice: Choice, progress: Progress) -> None:
        self.library, self.entry, self.choice, self.progress = library, entry, choice, progress
        self.folder = library.snapshot(entry)
        self.old = self._old()

    def run(self, on_plan: Callable[[Plan], None], most_bytes: int | None = None) -> Entry:
        """Fetch what is missing; the record comes last."""
        with storing(self.folder):
            make_folder(self.folder)
            self._reuse()
            missing = [file for file in self.choice.files if not self._is_here(file)]
            fetched = sum(max(0, (file.size or 0) - self._arrived(file)) for file in missing)
        on_plan(Plan(self.entry, fetched, self.folder))
        if most_bytes is not None and fetched > most_bytes:
            raise StoreFull(
                f"{self.entry.name} needs {fetched / 1e9:.2f} GB more, and clients may fill the store with another "
                f"{most_bytes / 1e9:.2f} GB; delete a model, or ask the server's owner for a larger --max-store."
            )
        if missing:
            self._check_space(fetched)
        if self.old is None:
            self.library.write(self.entry)  # unfinished: `list` tells, `rm` and another pull find it
        for file in missing:
            download(file, self.folder / file.path, self._reporter(file))
        self._check()
        files = tuple(replace(f, size=(self.folder / f.path).stat().st_size) for f in self.entry.files)
        done = replace(self.entry, files=files, complete=True)
        self.library.write(done)
        self._tidy()
        return done

    def _reporter(self, file: RemoteFile) -> Callable[[int], None]:
        return lambda done: self.progress(file.path, done, file.size or 0)

    def _old(self) -> Entry | None:
        with contextlib.suppress(ModelFileError):  # a damaged record is written anew
            entry = self.library.entry(self.entry.name)
            return entry if entry is not None and entry.complete else None
        return None

    def _is_here(self, file: RemoteFile) -> bool:
        """A file under its own name was checked before it got it."""
        path = self.folder / file.path
        return path.is_file() and not path.is_symlink() and file.size in (None, path.stat().st_size)

    def _arrived(self, file: RemoteFile) -> int:
        part = part_of(self.folder / file.path, file)
        return part.stat().st_size if part.exists() else 0

    def _reuse(self) -> None:
        """Take over files that have not changed since the version that is here."""
        if self.old is None or self.old.snapshot == self.entry.snapshot:
            return
        known = {file.digest: self.library.snapshot(self.old) / file.path for file in self.old.files if file.digest}
        for file in self.choice.files:
            if file.digest in known and not self._is_here(file) and known[file.digest].is_file():
                target = self.folder / file.path
                make_folder(target.parent)
                with contextlib.suppress(OSError):  # no hard links here: it is fetched
                    os.link(known[file.digest], target)

    def _check_space(self, needed: int) -> None:
        with storing(self.folder):
            free = shutil.disk_usage(self.folder).free
        if needed + SPARE_BYTES > free:
            raise StoreError(
                f"{self.entry.name} needs {needed / 1e9:.2f} GB more, {self.library.root} has {free / 1e9:.2f} GB "
                "free; free some space, or point EDGE_RUNTIME_MODELS to a folder on another disk."
            )

    def _check(self) -> None:
        """Refuse what is no model that runs here."""
        if self.choice.kind == "checkpoint":
            return
        paths = {
            role: self.folder / file.path
            for role, file in (("decoder", self.choice.decoder), ("mmproj", self.choice.mmproj))
            if file is not None
        }
        for path in paths.values():
            try:
                check_model_file(path)
            except ModelFileError:
                path.unlink()  # nothing may run it; fetching it again is all that can help
                raise
        check_roles(paths)

    def _tidy(self) -> None:
        """Remove earlier versions and what was left of cut downloads."""
        keep = {self.folder / file.path for file in self.entry.files}
        with contextlib.suppress(
            OSError
        ):  # Windows keeps files that a process has mapped: the next pull removes them
            for path in self.library.folder(self.entry.name).iterdir():
                if path.is_dir() and path != self.folder.parent:
                    shutil.rmtree(path, ignore_errors=True)
            for path in self.folder.rglob("*.part"):
                if path not in keep:
                    path.unlink()


def check_roles(paths: Mapping[str, Path]) -> None:
    """Check that files are what they are taken for, and belong to one model.

    Parameters
    ----------
    paths : `decoder` and `mmproj`, or one of them.

    Raises
    ------
    ModelFileError
        When one is damaged or of another type, or their widths differ.
    """
    found = {role: check_model_file(path) for role, path in paths.items()}
    for role, (actual, _) in found.items():
        if role != actual:
            raise ModelFileError(
                f"{paths[role].name} is a file of type {actual}, expected {role}; name the decoder first, and its "
                "mmproj file with --mmproj."
            )
    widths = {role: hidden for role, (_, hidden) in found.items()}
    if len(set(widths.values())) > 1:
        raise ModelFileError(
            f"{paths['decoder'].name} has hidden size {widths['decoder']}, but the visual tokens of "
            f"{paths['mmproj'].name} have {widths['mmproj']}; expected the two files of one model: choose another "
            "with --mmproj."
        )


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()
