"""Which wheels a bundle holds, and where each comes from: a folder, this installation, or a package index.

For this kind of machine and this Python, nothing is fetched: what is installed here is what was tried here. For
others, pip fetches wheels; llama-cpp-python is no wheel on PyPI and has to be given.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.bundle.targets import FETCHED_GLIBC, Target
from edge_runtime.bundle.wheels import OWN, pack, pack_own, why_not_packed
from edge_runtime.errors import BundleError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

LLAMA = "llama-cpp-python"
LLAMA_INDEX = "https://abetlen.github.io/llama-cpp-python/whl/cpu"
PIP = "pip"
EXTRAS = ("serve", "pdf", "video", "heif")
"""Extras that a bundle holds where they are installed here and nothing else is asked for."""
MAX_REASON = 600  # characters of what pip says

Say = Callable[[str], None]


@dataclass(frozen=True)
class Selected:
    """The wheels of a bundle, in a folder."""

    wheels: tuple[Path, ...]
    pip: Path
    """The one that installs them."""
    llama: Path


def installed_extras() -> tuple[str, ...]:
    """Those of `EXTRAS` whose requirements are installed here."""
    return tuple(extra for extra in EXTRAS if not _required((extra,), {})[1])


def check_extras(extras: Sequence[str]) -> None:
    """Raise `BundleError` for an extra that this package does not have."""
    known = metadata.metadata(OWN).get_all("Provides-Extra") or []
    for extra in extras:
        if extra not in known:
            raise BundleError(f"--extra is {extra!r}; expected one of {', '.join(known)}.")


def select(
    target: Target, extras: Sequence[str], given: Path | None, kernels: Path | None, folder: Path, say: Say
) -> Selected:
    """Bring the wheels for a target into a folder.

    Parameters
    ----------
    given : a folder with wheels that are taken before any other.
    kernels : a folder with kernels for the target that were compiled ahead of time, or None.
    folder : an empty one.
    say : is told what is fetched.

    Raises
    ------
    BundleError
        When something that is needed is neither given nor installed, and cannot be fetched.
    """
    own = pack_own(folder, kernels, target.platform)
    wheels = _given(target, given)
    if target.is_here:
        _from_here(extras, wheels, folder, say)
    else:
        _from_index(target, extras, wheels, own, folder, say, has_kernels=kernels is not None)
    paths = sorted(folder.glob("*.whl"))
    pip = next((path for path in paths if path.name.startswith("pip-")), None)
    llama = next((path for path in paths if path.name.startswith("llama_cpp_python-")), None)
    assert pip is not None, "it was asked for by name"
    assert llama is not None, "likewise"
    return Selected(tuple(paths), pip, llama)


def _given(target: Target, folder: Path | None) -> dict[str, Path]:
    """Wheels of a folder that fit the target, by the name of their project; the best fitting of each."""
    from packaging.tags import compatible_tags, cpython_tags
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    if folder is None:
        return {}
    if not folder.is_dir():
        raise BundleError(f"--wheels is {folder}, which is no folder; expected one with .whl files.")
    platforms = [*target.platforms()]
    interpreter = "cp" + "".join(map(str, target.python))
    order: dict[object, int] = {}
    for tag in [
        *cpython_tags(target.python, platforms=platforms),
        *compatible_tags(target.python, interpreter, platforms),
    ]:
        order.setdefault(tag, len(order))
    best: dict[str, tuple[object, int, Path]] = {}
    for path in sorted(folder.glob("*.whl")):
        try:
            name, version, _, tags = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            raise BundleError(f"{path} does not have the name of a wheel; rename or remove it.") from None
        fit = min((order[tag] for tag in tags if tag in order), default=None)
        if fit is not None and (name not in best or (version, -fit) > best[name][:2]):
            best[name] = (version, -fit, path)
    return {name: path for name, (_, _, path) in best.items()}


# --- from this installation ---------------------------------------------------------------------------------


def _from_here(extras: Sequence[str], given: dict[str, Path], folder: Path, say: Say) -> None:
    found, missing = _required(tuple(extras), given)
    if missing:
        names = ", ".join(sorted(map(str, missing)))
        raise BundleError(
            f"{names} is not installed here; install what the bundle shall hold, leave out --extra, or give wheels "
            "with --wheels FOLDER."
        )
    to_fetch = {}
    for name, distribution in sorted(found.items()):
        if name == OWN:
            continue
        if name in given:
            _take(given[name], folder)
        elif reason := why_not_packed(distribution):
            to_fetch[f"{name}=={distribution.version}"] = reason
        else:
            pack(distribution, folder)
    if to_fetch:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in to_fetch.items())
        say(f"Fetching with pip what cannot be taken from this installation ({reasons}).")
        _pip_download([*to_fetch], folder, ["--no-deps"])


def _take(wheel: Path, folder: Path) -> None:
    """Bring a given wheel into the folder, without a copy if it is on the same disk."""
    try:
        os.link(wheel.resolve(), folder / wheel.name)
    except OSError:
        shutil.copyfile(wheel, folder / wheel.name)


def _required(
    extras: tuple[str, ...], given: dict[str, Path]
) -> tuple[dict[str, metadata.Distribution], list[Requirement]]:
    """What this package needs with these extras, and pip, by name; and what is neither given nor installed."""
    from packaging.requirements import Requirement

    found: dict[str, metadata.Distribution] = {}
    missing: dict[str, Requirement] = {}
    # pip itself, because a Debian without python3-venv has none, and perhaps no network to get it.
    todo = [Requirement(f"{OWN}[{','.join(extras)}]" if extras else OWN), Requirement(PIP)]
    seen = set()
    while todo:
        requirement = todo.pop()
        name = _name(requirement.name)
        distribution = _of_wheel(given[name]) if name in given else _installed(name)
        if distribution is None or not requirement.specifier.contains(distribution.version, prereleases=True):
            missing[name] = requirement
        elif (key := (name, frozenset(requirement.extras))) not in seen:
            seen.add(key)
            found[name] = distribution
            todo += _needed_by(distribution, requirement.extras)
    return found, [*missing.values()]


def _installed(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def _of_wheel(wheel: Path) -> metadata.Distribution:
    try:
        inside = zipfile.Path(wheel)
        (info,) = (place for place in inside.iterdir() if place.name.endswith(".dist-info"))
        distribution = metadata.PathDistribution(info)
        distribution.version  # noqa: B018 - read now, while the error can be told
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{wheel} is damaged ({error}); expected a wheel. Replace it.") from None
    return distribution


def _needed_by(distribution: metadata.Distribution, extras: Iterable[str]) -> list[Requirement]:
    from packaging.requirements import Requirement

    listed = [Requirement(text) for text in distribution.requires or ()]
    return [
        requirement
        for requirement in listed
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in (*extras, ""))
    ]


def _name(name: str) -> str:
    from packaging.utils import canonicalize_name

    return canonicalize_name(name)


# --- from a package index -----------------------------------------------------------------------------------


def _from_index(
    target: Target,
    extras: Sequence[str],
    given: dict[str, Path],
    own: Path,
    folder: Path,
    say: Say,
    *,
    has_kernels: bool,
) -> None:
    pinned = _pin_of_llama()
    if LLAMA not in given:
        raise BundleError(_how_to_get_llama(target, pinned))
    links = folder / "given"
    links.mkdir()
    for wheel in given.values():
        _take(wheel, links)
    say(
        f"Fetching wheels for {target.name}, Python {target.python_name}, with pip; --wheels FOLDER is looked into "
        "first. Nothing but the names of packages is sent."
    )
    wanted = f"{own}[{','.join(extras)}]" if extras else str(own)
    options = [f"--platform={tag}" for tag in target.platforms(FETCHED_GLIBC)]
    options += [f"--abi={abi}" for abi in ("cp" + "".join(map(str, target.python)), "abi3", "none")]
    options += ["--implementation=cp", f"--python-version={target.python_name}", f"--find-links={links}"]
    # Kernels that were compiled ahead of time belong to these releases.
    pins = [f"{name}=={metadata.version(name)}" for name in ("numba", "llvmlite")] if has_kernels else []
    _pip_download([wanted, PIP, *pins], folder, options)
    for wheel in links.iterdir():
        wheel.unlink()
    links.rmdir()


def _pin_of_llama() -> str:
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in metadata.requires(OWN) or ()]
    return next(str(requirement) for requirement in requirements if _name(requirement.name) == LLAMA)


def _how_to_get_llama(target: Target, pinned: str) -> str:
    tags = " ".join(f"--platform={kind}_{target.machine}" for kind in ("manylinux2014", "manylinux_2_17"))
    return (
        f"{pinned} has no wheel for {target.name} on PyPI, so it has to be given with --wheels FOLDER. Build one on "
        f"such a machine with 'pip wheel --no-deps {pinned} -w FOLDER', or fetch its authors' own: 'pip download "
        f"--no-deps --only-binary=:all: {tags} --index-url={LLAMA_INDEX} -d FOLDER {pinned}'."
    )


def _pip_download(wanted: Sequence[str], folder: Path, options: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(
        [*command, "--only-binary=:all:", f"--dest={folder}", *options, *wanted], capture_output=True, text=True
    )
    if done.returncode:
        reason = " ".join(done.stderr.split())[-MAX_REASON:] or f"it ended with {done.returncode}"
        raise BundleError(
            f"pip could not fetch what the bundle needs: {reason} Check the connection, or give the wheels with "
            "--wheels FOLDER."
        )
