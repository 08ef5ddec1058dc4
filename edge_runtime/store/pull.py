"""A model's name → its files in the store: list, choose, check the space, fetch, verify, record.

The files of each version have a snapshot of their own, and the record is replaced once all of them are there and
valid. So an interrupted pull leaves the store as it was, an update does not touch a running model, and the next pull
resumes.
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
"""(file, bytes so far, bytes in total)"""

SPARE_BYTES = 64 << 20
"""Left free on the disk after a pull."""


@dataclass(frozen=True)
class Plan:
    """What a pull is about to do."""

    entry: Entry
    fetched: int
    """Bytes to fetch; less than the size if some of them are here already."""
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
    max_bytes: int | None = None,
) -> Entry:
    """Bring a model into the store.

    Parameters
    ----------
    name : see `names`.
    mmproj : the mmproj file if it is not the usual one: a name in the repository, or a second address.
    progress : called while bytes arrive.
    on_plan : called once it is known what will be fetched.
    on_wait : called repeatedly while another process is pulling the same model; this call waits for it.
    allowed : addresses that a server's owner lets clients fetch from, besides the hubs. None: the owner asks,
        and may name any address.
    max_bytes : how much may be fetched.

    Raises
    ------
    ModelFileError
        When the name is not valid, or a file is not a model that this package runs.
    DownloadError
        When something cannot be fetched or stored. What has arrived is kept, so the next call resumes.
    AddressRefused
        When the name is or leads to a forbidden address; nothing was sent there.
    """
    source, library = _source(name), library or Library()
    policy = None if allowed is None else FetchPolicy(tuple(allowed), endpoint_of(source))
    if source.kind == "ollama":
        if mmproj is not None:
            raise ModelFileError(f"{name} has its own mmproj file; expected no --mmproj here: pass it to 'run'.")
        return _link(source, library, progress)
    with enforced(policy):
        listing = list_files(source, mmproj)
        choice = choose(source, listing, mmproj if source.kind != "url" else None)
        entry = _describe(source, listing, choice)
        with library.lock(entry.name, on_wait):
            return _Pull(library, entry, choice, progress).run(on_plan, max_bytes)


def fetch_checkpoint(name: str, progress: Progress, on_plan: Callable[[Plan], None]) -> tuple[Path, str]:
    """Folder of a checkpoint, and a name for it: a folder is used as it is, a name on a hub is pulled first.

    Raises
    ------
    DownloadError, ModelFileError
        As for `pull`; also when the repository holds GGUF files, which need no conversion.
    """
    source = parse_source(name)
    if source is None:
        return Path(name), Path(name).resolve().name
    if source.kind not in ("hf", "ms"):
        raise ModelFileError(f"{source.name} is not a checkpoint; expected a folder, hf:ORG/REPO or ms:ORG/REPO.")
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
    """Check a GGUF file the way it is checked before llama.cpp or a kernel reads it.

    Returns
    -------
    role : `decoder` or `mmproj`.
    hidden : width of the decoder, or of the visual tokens.

    Raises
    ------
    ModelFileError
        When it is damaged, or belongs to a model that this package does not run.
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
            f"{visible(name)[:120]!r} is not something to pull; expected minicpm-v-4.5, hf:ORG/REPO, ms:ORG/REPO, "
            "ollama:NAME or an https address of a .gguf file."
        )
    return source


def _link(source: Source, library: Library, progress: Progress) -> Entry:
    """Check a model in the Ollama store and record it; its files stay where they are."""
    model = ollama.verify(source.place, progress)
    check_roles({"decoder": model.decoder.path, "mmproj": model.mmproj.path})
    entry = Entry(source.name, "ollama", pulled=_today(), complete=True)
    library.write(entry)
    return entry


def _describe(source: Source, listing: Listing, choice: Choice) -> Entry:
    """The record to write; the file is part of the name, so that two decoders of one repository are two models."""
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

    def run(self, on_plan: Callable[[Plan], None], max_bytes: int | None = None) -> Entry:
        """Fetch what is missing; the record is written last."""
        with storing(self.folder):
            make_folder(self.folder)
            self._reuse()
            missing = [file for file in self.choice.files if not self._is_here(file)]
            fetched = sum(max(0, (file.size or 0) - self._arrived(file)) for file in missing)
        on_plan(Plan(self.entry, fetched, self.folder))
        if max_bytes is not None and fetched > max_bytes:
            raise StoreFull(
                f"{self.entry.name} needs {fetched / 1e9:.2f} GB more, and clients may add another "
                f"{max_bytes / 1e9:.2f} GB to the store; delete a model, or ask the server's "
                "owner for a larger --max-store."
            )
        if missing:
            self._check_space(fetched)
        if self.old is None:
            self.library.write(self.entry)  # incomplete: `list` shows it, `rm` and another pull find it
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
        with contextlib.suppress(ModelFileError):  # a damaged record is replaced
            entry = self.library.entry(self.entry.name)
            return entry if entry is not None and entry.complete else None
        return None

    def _is_here(self, file: RemoteFile) -> bool:
        """Whether a file is complete: it gets its final name only once it is verified."""
        path = self.folder / file.path
        return path.is_file() and not path.is_symlink() and file.size in (None, path.stat().st_size)

    def _arrived(self, file: RemoteFile) -> int:
        part = part_of(self.folder / file.path, file)
        return part.stat().st_size if part.exists() else 0

    def _reuse(self) -> None:
        """Link files that have not changed since the version already here."""
        if self.old is None or self.old.snapshot == self.entry.snapshot:
            return
        known = {file.digest: self.library.snapshot(self.old) / file.path for file in self.old.files if file.digest}
        for file in self.choice.files:
            if file.digest in known and not self._is_here(file) and known[file.digest].is_file():
                target = self.folder / file.path
                make_folder(target.parent)
                with contextlib.suppress(OSError):  # no hard links on this disk: the file is fetched
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
        """Refuse files that are not a model that this package runs."""
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
                path.unlink()  # nothing may run it; only fetching it again can help
                raise
        check_roles(paths)

    def _tidy(self) -> None:
        """Remove earlier versions and leftovers of interrupted downloads."""
        keep = {self.folder / file.path for file in self.entry.files}
        with contextlib.suppress(OSError):  # Windows does not delete mapped files: the next pull does
            for path in self.library.folder(self.entry.name).iterdir():
                if path.is_dir() and path != self.folder.parent:
                    shutil.rmtree(path, ignore_errors=True)
            for path in self.folder.rglob("*.part"):
                if path not in keep:
                    path.unlink()


def check_roles(paths: Mapping[str, Path]) -> None:
    """Check that each file has the expected role, and that they belong to one model.

    Parameters
    ----------
    paths : `decoder` and `mmproj`, or one of them.

    Raises
    ------
    ModelFileError
        When a file is damaged or of another type, or their widths differ.
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
