"""Installed distributions → wheels, without compiling and without a network.

A wheel holds what its installer recorded (RECORD, whose checksums are compared), so that a package that was compiled
here for minutes is a wheel again in seconds. Files are in order of their names and have one date: the same
installation makes the same bytes.

Sources: PyPA specifications "Recording installed projects", "Binary distribution format".
"""

from __future__ import annotations

import base64
import configparser
import hashlib
import os
import re
import zipfile
from collections.abc import Iterable
from importlib import metadata, util
from pathlib import Path, PurePosixPath

from edge_runtime.errors import BundleError

OWN = "edge-runtime"
OWN_PACKAGES = ("edge_runtime", "edge_kernels", "edge_converters")
COMPILED = "edge_kernels/compiled"
"""Where kernels that were compiled ahead of time lie in the wheel."""
CHUNK_BYTES = 1 << 20
_DATE = (1980, 1, 1, 0, 0, 0)  # the first that a zip file can hold
_NOT_PACKED = frozenset({"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"})  # about an installation


class WheelWriter:
    """Writes a wheel, and its record last.

    Parameters
    ----------
    folder : of the new file.
    stem : NAME-VERSION, as the wheel's `.dist-info` folder has it.
    tags : of the WHEEL file.
    """

    def __init__(self, folder: Path, stem: str, tags: Iterable[str]) -> None:
        parts = [tag.split("-") for tag in tags]
        if not parts or any(len(part) != 3 for part in parts):
            raise BundleError(f"{stem} has no tags in its WHEEL file; install it again with pip.")
        joined = "-".join(".".join(sorted(set(column))) for column in zip(*parts, strict=True))
        self.path = folder / f"{stem}-{joined}.whl"
        self._info = f"{stem}.dist-info"
        self._lines: list[str] = []
        self._zip = zipfile.ZipFile(self.path, "w", zipfile.ZIP_DEFLATED)

    def add(self, name: str, source: Path | bytes, digest: str = "", mode: int = 0o644) -> None:
        """Add a file.

        Parameters
        ----------
        digest : `sha256=...` as in RECORD; compared unless empty.

        Raises
        ------
        BundleError
            When the file is not what was installed.
        """
        entry = zipfile.ZipInfo(name, _DATE)
        entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, (0o100000 | mode) << 16
        found, size = hashlib.sha256(), 0
        with self._zip.open(entry, "w", force_zip64=True) as out:
            for chunk in [source] if isinstance(source, bytes) else _chunks(source):
                found.update(chunk)
                size += len(chunk)
                out.write(chunk)
        encoded = "sha256=" + base64.urlsafe_b64encode(found.digest()).decode().rstrip("=")
        if digest.startswith("sha256=") and digest != encoded:
            raise BundleError(
                f"{name} was changed since it was installed; install its package again, or give its wheel with "
                "--wheels FOLDER."
            )
        self._lines.append(f"{_quoted(name)},{encoded},{size}\n")

    def close(self) -> Path:
        """Write the record; returns the path of the wheel."""
        record = f"{self._info}/RECORD"
        self.add(record, "".join([*self._lines, f"{_quoted(record)},,\n"]).encode())
        self._zip.close()
        return self.path


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if any(c in name for c in ',"\n') else name


def _chunks(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def why_not_packed(distribution: metadata.Distribution) -> str:
    """Why an installed distribution cannot become a wheel; empty if it can."""
    if distribution.files is None or info_folder(distribution) is None:
        return "its installer kept no record of its files"
    if '"editable": true' in (distribution.read_text("direct_url.json") or ""):
        return "it is installed in editable mode"
    return ""


def info_folder(distribution: metadata.Distribution) -> Path | None:
    """The distribution's `.dist-info` folder; None for older kinds of installation."""
    for file in distribution.files or ():
        if len(file.parts) == 2 and file.parts[0].endswith(".dist-info") and file.name == "METADATA":
            return Path(str(distribution.locate_file(file.parts[0])))
    return None


def pack(distribution: metadata.Distribution, folder: Path) -> Path:
    """Make a wheel of an installed distribution.

    Raises
    ------
    BundleError
        When a file is missing or was changed.
    """
    info = info_folder(distribution)
    assert info is not None, "why_not_packed was asked"
    packed = _packed_files(distribution)
    wheel = WheelWriter(folder, info.name.removesuffix(".dist-info"), _tags(distribution))
    for name, (path, digest) in sorted(packed.items()):
        if not path.is_file():
            raise BundleError(
                f"{path} is missing; install its package again, or give its wheel with --wheels FOLDER."
            )
        if ".data/scripts/" in name:
            wheel.add(name, _without_interpreter(path.read_bytes()), mode=_mode(path))
        else:
            wheel.add(name, path, digest, _mode(path))
    return wheel.close()


def _mode(path: Path) -> int:
    return 0o755 if path.stat().st_mode & 0o100 else 0o644


def _tags(distribution: metadata.Distribution) -> list[str]:
    return re.findall(r"^Tag: *(\S+) *$", distribution.read_text("WHEEL") or "", re.MULTILINE)


def _packed_files(distribution: metadata.Distribution) -> dict[str, tuple[Path, str]]:
    """Name in the wheel → installed file and digest. Scripts that the installer wrote are left out."""
    info = info_folder(distribution)
    assert info is not None
    stem = info.name.removesuffix(".dist-info")
    written = {f"{name}{suffix}" for name in _commands(distribution) for suffix in ("", ".exe", "-script.py")}
    site = info.parent.resolve()
    prefix = site.parents[2]  # PREFIX/lib/pythonX.Y/site-packages, in environments and in a home folder alike
    found = {}
    for file in distribution.files or ():
        if file.suffix == ".pyc" or (
            file.parts[0] == info.name and file.name in _NOT_PACKED and len(file.parts) == 2
        ):
            continue
        digest = f"{file.hash.mode}={file.hash.value}" if file.hash else ""
        path = Path(os.path.normpath(site / file))
        if path.is_relative_to(site):
            found[path.relative_to(site).as_posix()] = (path, digest)
        elif path.parent == prefix / "bin":
            if path.name not in written:
                found[f"{stem}.data/scripts/{path.name}"] = (path, "")
        elif path.is_relative_to(prefix):
            found[f"{stem}.data/data/{path.relative_to(prefix).as_posix()}"] = (path, digest)
        else:
            raise BundleError(f"{path} of {stem} lies outside of {prefix}; give a wheel of it with --wheels FOLDER.")
    return found


def _commands(distribution: metadata.Distribution) -> set[str]:
    parser = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(distribution.read_text("entry_points.txt") or "")
    return {name for section in ("console_scripts", "gui_scripts") if section in parser for name in parser[section]}


def _without_interpreter(script: bytes) -> bytes:
    """A script as wheels hold it: `#!python` is replaced where it is installed."""
    first, newline, rest = script.partition(b"\n")
    return b"#!python" + newline + rest if first.startswith(b"#!") and b"python" in first else script


def pack_own(folder: Path, kernels: Path | None, platform: str) -> Path:
    """Make a wheel of this package, also where it is installed in editable mode.

    Parameters
    ----------
    kernels : a folder with kernels compiled ahead of time, or None.
    platform : such as linux_x86_64; the wheel's tag if it holds kernels.

    Raises
    ------
    BundleError
        When the package is not installed, only on the path.
    """
    try:
        distribution = metadata.distribution(OWN)
    except metadata.PackageNotFoundError:
        raise BundleError(f"{OWN} is not installed here, only on the path; install it with pip first.") from None
    info = info_folder(distribution)
    if info is None:
        raise BundleError(f"{OWN} has no record of its installation; install it again with pip.")
    tag = f"py3-none-{platform if kernels else 'any'}"
    wheel = WheelWriter(folder, info.name.removesuffix(".dist-info"), [tag])
    files = {
        **_own_files(),
        **{f"{COMPILED}/{path.relative_to(kernels).as_posix()}": path for path in _below(kernels) if kernels},
        **{
            f"{info.name}/{path.relative_to(info).as_posix()}": path
            for path in _below(info)
            if path.parent != info or path.name not in {*_NOT_PACKED, "WHEEL"}
        },
    }
    for name, path in sorted(files.items()):
        wheel.add(name, path)
    root = "false" if kernels else "true"
    wheel.add(
        f"{info.name}/WHEEL",
        f"Wheel-Version: 1.0\nGenerator: {OWN}\nRoot-Is-Purelib: {root}\nTag: {tag}\n".encode(),
    )
    return wheel.close()


def _own_files() -> dict[str, Path]:
    found = {}
    for package in OWN_PACKAGES:
        spec = util.find_spec(package)
        assert spec is not None, "they come together"
        for place in spec.submodule_search_locations or ():
            root = Path(place)
            for path in _below(root):
                name = (PurePosixPath(package) / path.relative_to(root).as_posix()).as_posix()
                if not name.startswith(f"{COMPILED}/"):  # of this machine; the bundle has its target's
                    found[name] = path
    return found


def _below(folder: Path | None) -> list[Path]:
    """Files of a folder, without caches and hidden files."""
    if folder is None:
        return []
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix != ".pyc"
        and not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)
    )
