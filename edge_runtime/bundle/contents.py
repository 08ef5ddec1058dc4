"""What is in wheels: sizes, what they ask of a system, and the licences of what they hold."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

from edge_runtime.bundle.elf import MAGIC, needs
from edge_runtime.bundle.targets import glibc_of_tag
from edge_runtime.errors import BundleError

_LICENCE = re.compile(r"(licen[sc]e|copying|notice|authors|copyright)", re.IGNORECASE)
_COMPILED = re.compile(r"\.so(\.\d+)*$")


@dataclass
class Contents:
    """Of one wheel."""

    name: str
    version: str
    licence: str
    installed_bytes: int = 0
    glibc: tuple[int, ...] = ()
    libraries: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Path of each library that was not made for any system (see `manylinux`) → names of those it needs."""
    licences: dict[str, bytes] = field(default_factory=dict)


def look_into(wheel: Path) -> Contents:
    """Read a wheel.

    Raises
    ------
    BundleError
        When it is damaged.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return _look_into(wheel, archive)
    except (zipfile.BadZipFile, KeyError, ValueError, NotImplementedError, EOFError) as error:
        raise BundleError(f"{wheel.name} is damaged ({error}); expected a wheel. Replace it.") from None


def _look_into(wheel: Path, archive: zipfile.ZipFile) -> Contents:
    (info,) = {name.split("/")[0] for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)}
    metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode("utf-8", "replace"))
    licence = metadata["License-Expression"] or metadata["License"] or ", ".join(_classified(metadata)) or "see files"
    found = Contents(metadata["Name"], metadata["Version"], licence.strip().splitlines()[0][:120])
    # Tags promise a version of glibc; a library that was compiled here says itself what it needs.
    promised = max((glibc_of_tag(tag) for tag in wheel.stem.rsplit("-", 1)[1].split(".")), default=())
    for entry in archive.infolist():
        found.installed_bytes += entry.file_size
        path = entry.filename
        if path.startswith(f"{info}/") and (_LICENCE.search(path) or path.startswith(f"{info}/licenses/")):
            found.licences[path.removeprefix(f"{info}/").removeprefix("licenses/")] = archive.read(entry)
        elif not promised and _COMPILED.search(path):
            _add_needs(found, path, archive.read(entry))
    found.glibc = promised or found.glibc
    return found


def _add_needs(found: Contents, path: str, data: bytes) -> None:
    library = needs(data) if data.startswith(MAGIC) else None
    if library is not None:
        found.glibc = max(found.glibc, library.glibc)
        found.libraries[path] = library.libraries


def _classified(metadata: Message) -> Iterator[str]:
    for value in metadata.get_all("Classifier") or ():
        if value.startswith("License :: "):
            yield value.rpartition(" :: ")[2]
