"""The bundle itself: what it holds, its manifest, and the file, which appears whole or not at all.

TOP/bundle.json       what it is for and what it needs; read by install.py
TOP/README.txt, install.sh, install.py, sign.png
TOP/licences/         of every package, and the model
TOP/wheels/           this package, compiled kernels in it, all that it needs, and pip
TOP/libraries/        libraries of the system that small systems lack
TOP/models/NAME/      the model; the demo is in the package
TOP/SHA256SUMS        of all of these
"""

from __future__ import annotations

import glob
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from edge_runtime.bundle.archive import CHECKSUMS, Archive
from edge_runtime.bundle.contents import Contents, look_into
from edge_runtime.bundle.llama import Found, ask, not_everywhere
from edge_runtime.bundle.selection import Say, Selected, check_extras, installed_extras, select
from edge_runtime.bundle.targets import Target, choose
from edge_runtime.errors import BundleError, ModelFileError
from edge_runtime.store.find import ModelPaths, find_model, is_mmproj
from edge_runtime.store.library import Library
from edge_runtime.store.names import DEMO, parse_source
from edge_runtime.store.shipped import ABOUT, checked_name, find_shipped
from edge_runtime.system.atomic_files import make_folder, remove_abandoned, unfinished, why_not_written
from edge_runtime.version import __version__
from edge_runtime.weights.gguf_file import GGUFFile

FORMAT = 1
SPARE_BYTES = 64 << 20
PYC_SHARE = 1.3
"""Installed packages need more than the files of their wheels: Python's compiled modules."""
LIBRARY_LICENCES = ("libgomp1", "gcc-base", "gcc-12-base", "gcc-13-base", "gcc-14-base", "gcc-15-base")

LLAMA_LIBRARIES = "llama_cpp/lib"
"""Where the wheel has llama.cpp's libraries; they look for others beside themselves. It has more, unused ones."""

CompileKernels = Callable[[str, Sequence[str] | None, Path], Sequence[str]]
"""(target, instruction sets or None for the usual ones, folder) → those that the folder has kernels for then."""


@dataclass(frozen=True)
class Wanted:
    """What a bundle shall hold."""

    model: str
    mmproj: Path | None = None
    target: str | None = None
    """linux-x86_64 or linux-aarch64; None: this machine."""
    python: str | None = None
    """Such as 3.12; None: this one."""
    extras: Sequence[str] | None = None
    """None: those that are installed here."""
    kernels: Sequence[str] | None = None
    """Instruction sets to compile kernels for; None: the usual ones."""
    wheels: Path | None = None
    """A folder with wheels to take first."""
    name: str | None = None
    """Of the model, once installed; None: its own."""


@dataclass(frozen=True)
class Made:
    """A finished bundle."""

    path: Path
    manifest: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """What it lacks, in sentences."""


@dataclass(frozen=True)
class _Model:
    """The files of a model, by their names in the bundle."""

    name: str
    files: dict[str, Path]
    source: str
    licence: str
    texts: dict[str, Path]
    """Licences that lie beside it."""

    @property
    def n_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def make_bundle(wanted: Wanted, output: Path, compile_kernels: CompileKernels, say: Say, *, force: bool) -> Made:
    """Make a bundle.

    Parameters
    ----------
    output : the tar file. It gets its name once it is whole.
    say : is told what is fetched and what takes long.
    force : replace an existing file.

    Raises
    ------
    BundleError
        When something is missing here, or cannot be written.
    ModelFileError
        When the model cannot be found.
    """
    target = choose(wanted.target, wanted.python)
    model = _model(wanted)
    extras = installed_extras() if wanted.extras is None else tuple(wanted.extras)
    check_extras(extras)
    _check_output(output, 0 if model is None else model.n_bytes, force)
    try:
        make_folder(output.absolute().parent)
        with tempfile.TemporaryDirectory(prefix=".edge-runtime-bundle-", dir=output.absolute().parent) as folder:
            (kernels := Path(folder) / "kernels").mkdir()
            isas = _kernels(target, wanted.kernels, kernels, compile_kernels)
            return _make(target, model, extras, wanted.wheels, isas, Path(folder), output.absolute(), say)
    except OSError as error:
        raise BundleError(f"{why_not_written(error, output)}; nothing was written.") from None


def _check_output(output: Path, model_bytes: int, force: bool) -> None:
    if output.is_dir():
        raise BundleError(f"{output} is a folder; expected the name of a file to write, such as {output}/BUNDLE.tar.")
    if output.exists() and not force:
        raise BundleError(f"{output} exists already; add --force to replace it.")
    parent = next(folder for folder in output.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < model_bytes + SPARE_BYTES:
        raise BundleError(
            f"{parent} has {free / 1e9:.2f} GB free, the model alone has {model_bytes / 1e9:.2f} GB; write the "
            "bundle to another disk."
        )


def _model(wanted: Wanted) -> _Model | None:
    """The model's files; None for the demo, which is in the package."""
    paths = find_model(wanted.model, wanted.mmproj)
    if wanted.model == DEMO and wanted.mmproj is None:
        return None
    own = re.sub(r"[^A-Za-z0-9._]+", "-", re.sub(r"^\w+:([^/]*/)*", "", paths.name)).strip("-.")[:80]
    name = checked_name(wanted.name or (f"{own}-model" if own == DEMO else own))
    source, licence = _origin(wanted.model, paths)
    if parse_source(name) is not None and not source:
        raise ModelFileError(
            f"{name} is the name of a model on a hub, and this is a folder; choose another with --name."
        )
    texts = {
        path.name: path
        for path in sorted(paths.decoder.parent.iterdir())
        if re.match(r"(licen[sc]e|notice|copying)", path.name, re.IGNORECASE) and path.is_file()
    }
    return _Model(name, _file_names(paths), source, licence, texts)


def _file_names(paths: ModelPaths) -> dict[str, Path]:
    """Their own names, if `find_model` tells them apart by these; Ollama's are checksums."""
    names = {paths.decoder.name: paths.decoder, paths.mmproj.name: paths.mmproj}
    good = all(re.fullmatch(r"[\w.-]{1,200}\.gguf", name) and not name.startswith((".", "-")) for name in names)
    if good and len(names) == 2 and is_mmproj(paths.mmproj) and not is_mmproj(paths.decoder):
        return names
    return {"model.gguf": paths.decoder, "mmproj.gguf": paths.mmproj}


def _origin(name: str, paths: ModelPaths) -> tuple[str, str]:
    """Where a model came from, and its licence, as far as is known."""
    source, shipped = parse_source(name), find_shipped(name)
    entry = Library().find(source) if source is not None else None
    if entry is not None and entry.complete:
        return entry.name, entry.licence or _stated(paths)
    if shipped is not None:
        return shipped.source, shipped.licence
    return "", _stated(paths)


def _stated(paths: ModelPaths) -> str:
    value = GGUFFile(paths.decoder).metadata.get("general.license")
    return value if isinstance(value, str) else ""


def _kernels(
    target: Target, wanted: Sequence[str] | None, folder: Path, compile_kernels: CompileKernels
) -> list[str]:
    """Compile kernels into the folder; returns the instruction sets they are for."""
    if target.python == sys.version_info[:2]:
        return list(compile_kernels(target.name, wanted, folder))
    if wanted:
        raise BundleError(
            f"Compiled kernels belong to one version of Python, and this is not {target.python_name}; run "
            f"edge-runtime with Python {target.python_name}, or leave out --kernels."
        )
    return []


def _make(
    target: Target,
    model: _Model | None,
    extras: Sequence[str],
    given: Path | None,
    isas: list[str],
    folder: Path,
    output: Path,
    say: Say,
) -> Made:
    (folder / "wheels").mkdir()
    say(f"Making wheels for {target.name}, Python {target.python_name}.")
    selected = select(target, extras, given, folder / "kernels" if isas else None, folder / "wheels", say)
    found = ask(selected.llama) if target.is_here else None
    contents = {wheel.name: look_into(wheel) for wheel in selected.wheels}
    libraries = _libraries(contents[selected.llama.name], found)
    manifest = {
        "format": FORMAT,
        "edge-runtime": __version__,
        "target": target.name,
        "machine": target.machine,
        "python": target.python_name,
        "glibc": ".".join(map(str, max((each.glibc for each in contents.values()), default=()))),
        "cpu_flags": [] if found is None else found.cpu_flags,
        "kernels": isas,
        "libraries": dict.fromkeys(libraries, LLAMA_LIBRARIES),
        "pip": selected.pip.name,
        "requirement": f"edge-runtime[{','.join(extras)}]=={__version__}"
        if extras
        else f"edge-runtime=={__version__}",
        "installed_bytes": int(PYC_SHARE * sum(each.installed_bytes for each in contents.values())),
        "model": None
        if model is None
        else {"name": model.name, "bytes": model.n_bytes, "files": [*model.files, ABOUT]},
    }
    top = f"edge-runtime-{__version__}-{target.name}-py{target.python_name}-{DEMO if model is None else model.name}"
    say("Writing the bundle.")
    remove_abandoned(output.parent.glob(f".{glob.escape(output.name)}.*.unfinished"))
    with unfinished(lambda token: output.with_name(f".{output.name}.{token}.unfinished")) as temporary:
        with temporary.open("wb") as file:
            archive = Archive(file, top)
            _fill(archive, top, manifest, selected, contents, libraries, model)
            archive.close()
        temporary.replace(output)
    return Made(output, manifest, _notes(target, found, isas, libraries))


def _libraries(llama: Contents, found: Found | None) -> dict[str, Path | None]:
    """Libraries that llama.cpp needs and a small system may lack, and where they are here."""
    own = {path: names for path, names in llama.libraries.items() if path.startswith(f"{LLAMA_LIBRARIES}/")}
    held = {path.rpartition("/")[2] for path in own}
    needed = {name for names in own.values() for name in names} - held
    return {name: found.loaded.get(name) if found else None for name in not_everywhere(needed)}


def _fill(
    archive: Archive,
    top: str,
    manifest: dict[str, Any],
    selected: Selected,
    contents: dict[str, Contents],
    libraries: dict[str, Path | None],
    model: _Model | None,
) -> None:
    own = resources.files("edge_runtime.bundle")
    archive.add("README.txt", _read_me(top, manifest).encode())
    archive.add("bundle.json", json.dumps(manifest, indent=1, sort_keys=True).encode())
    script = own.joinpath("install.sh").read_text("utf-8").replace("@PYTHON@", manifest["python"])
    archive.add("install.sh", script.encode(), 0o755)
    archive.add("install.py", own.joinpath("install.py").read_bytes())
    archive.add("sign.png", own.joinpath("sign.png").read_bytes())
    for name, text in sorted(_licences(contents, libraries, model).items()):
        archive.add(f"licences/{name}", text)
    for wheel in selected.wheels:
        archive.add(f"wheels/{wheel.name}", wheel)
    for name, path in sorted(libraries.items()):
        if path is not None:
            archive.add(f"libraries/{name}", path, 0o755)
    if model is not None:
        about = {"name": model.name, "source": model.source, "licence": model.licence}
        archive.add(f"models/{model.name}/{ABOUT}", json.dumps(about, indent=1).encode())
        for name, path in sorted(model.files.items()):
            archive.add(f"models/{model.name}/{name}", path)


def _licences(
    contents: dict[str, Contents], libraries: dict[str, Path | None], model: _Model | None
) -> dict[str, bytes]:
    found = {
        f"{each.name}-{each.version}/{_plain(name)}": text
        for each in contents.values()
        for name, text in each.licences.items()
    }
    lines = [f"{each.name} {each.version}: {each.licence}" for each in contents.values()]
    for library, path in libraries.items():
        if path is not None:
            lines.append(f"{library}: of GCC, GPL-3.0 with the GCC Runtime Library Exception 3.1")
            for package in LIBRARY_LICENCES:
                text = Path("/usr/share/doc") / package / "copyright"
                if text.is_file():
                    found[f"{library}/copyright"] = text.read_bytes()
                    break
    if model is None:
        lines.append("the model demo: that of edge-runtime")
    else:
        lines.append(f"the model {model.name}: {model.licence or 'not stated'} ({model.source or 'a folder'})")
        found |= {f"model/{_plain(name)}": path.read_bytes() for name, path in model.texts.items()}
    found["README.txt"] = ("\n".join(sorted(lines, key=str.lower)) + "\n").encode()
    return found


def _plain(name: str) -> str:
    """A name from a foreign file, fit for a tar file: no way out of its folder."""
    return "/".join(re.sub(r"[^\w.+-]", "_", part) for part in name.split("/") if part not in ("", ".", ".."))


def _read_me(top: str, manifest: dict[str, Any]) -> str:
    model = manifest["model"]
    return (
        f"edge-runtime {manifest['edge-runtime']} with the model {model['name'] if model else DEMO}, for "
        f"{manifest['target']} with Python {manifest['python']} and glibc {manifest['glibc']} or newer.\n\n"
        f"    sh {top}/install.sh [PREFIX]\n\n"
        "installs it into PREFIX ($HOME/edge-runtime) without network and compiler, after comparing every file with\n"
        f"{CHECKSUMS}. What is inside belongs to many; licences/README.txt lists them.\n"
    )


def _notes(target: Target, found: Found | None, isas: Sequence[str], libraries: dict[str, Path | None]) -> list[str]:
    notes = []
    if not isas:
        notes.append(
            "It holds no compiled kernels: the first picture compiles them, 20 to 40 seconds and more on boards."
        )
    if found is None:
        what = (
            f"llama.cpp for {target.name} cannot be loaded here" if not target.is_here else "llama.cpp does not load"
        )
        notes.append(f"{what}, so the processor features that it needs are not known; installing tries it.")
    elif found.cpu_flags:
        notes.append(f"Its llama.cpp runs on processors with {', '.join(found.cpu_flags)}.")
    lacking = [name for name, path in libraries.items() if path is None]
    if lacking:
        notes.append(f"The target needs {', '.join(lacking)} of its own; installing says so where it is missing.")
    return notes
