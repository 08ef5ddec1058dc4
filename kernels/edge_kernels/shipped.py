"""Kernels that were compiled ahead of time: found, checked, and loaded instead of compiled.

What enters: a folder that `ahead` has filled, in the installed package (`compiled/`) or named by the environment
variable EDGE_RUNTIME_COMPILED. What leaves: compiled functions as numba's own cache returns them, or None.

    compiled/avx2/manifest.json         what the code was made from and for, size and digest of every file
    compiled/avx2/rows.norm._layer_norm what `pack` makes of one kernel: object code, and what numba must know of it

Nothing in the folder depends on where it lies, and nothing is ever written to it. It is code: see `_distrust`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import stat
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import numba
from llvmlite import binding as llvm

from edge_kernels.machine import cpu_features, isa
from edge_kernels.targets import system_of

logger = logging.getLogger("edge_kernels")

VARIABLE = "EDGE_RUNTIME_COMPILED"
"""Names the folder; "off" uses none."""
PACKAGE = Path(__file__).parent
MANIFEST = "manifest.json"
FORMAT = 1


class ShippedError(Exception):
    """Why shipped kernels cannot be used: the end of a sentence."""


class Entry(NamedTuple):
    """A file of a folder."""

    bytes: int
    sha256: str


class Made(NamedTuple):
    """What machine code was made from and for."""

    format: int
    sources: str
    numba: str
    llvmlite: str
    python: str
    triple: str
    cpu: str
    features: list[str]


class Folder(NamedTuple):
    """Checked kernels of one target.

    Attributes
    ----------
    path : Path
        The folder of the target.
    kernels : dict
        Name of a kernel (see `name_of`) → its file.
    """

    path: Path
    kernels: dict[str, Entry]


def name_of(function: Any) -> str:
    """Return the name of a kernel's file: its module below this package, and its own name."""
    module = str(function.__module__).removeprefix("edge_kernels.")
    return f"{module}.{function.__qualname__}"


def digest_sources(package: Path = PACKAGE) -> str:
    """Digest all sources of a copy of this package."""
    digest = hashlib.sha256()
    for source in sorted(package.rglob("*.py")):
        digest.update(source.relative_to(package).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()


def python_tag() -> str:
    """Return what of this interpreter machine code depends on, such as "cpython-313t"."""
    return f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}"


# --- writing and reading one kernel -------------------------------------------------------------------------------


def pack(result: Any, code: bytes) -> bytes:
    """Bring one compiled function into the form that `_rebuild` reads.

    Parameters
    ----------
    result : numba.core.compiler.CompileResult
    code : the object file of its library.
    """
    from numba.core.serialize import dumps

    # Unlike numba's own cache, this keeps no bitcode: nothing is ever inlined from here into other functions.
    description = result.fndesc
    description.typemap = description.calltypes = None  # not needed, and large
    entries = (description.llvm_func_name, description.llvm_cpython_wrapper_name, description.llvm_cfunc_wrapper_name)
    defined = {function.name for function in result.library.get_defined_functions()}
    return bytes(
        dumps(
            (
                result.library.name, code, [name for name in entries if name in defined], description,
                result.environment, result.signature, result.reload_init, result._find_referenced_environments(),
            )
        )
    )  # fmt: skip


def _rebuild(context: Any, data: bytes) -> Any:
    """Link what `pack` has made into this process; return numba's CompileResult."""
    from numba.core.compiler import compile_result
    from numba.core.runtime import rtsys

    name, code, entries, description, environment, signature, initialisers, environments = pickle.loads(data)
    rtsys.initialize(context)  # defines the functions that code for arrays calls
    for initialise in initialisers:
        initialise()
    codegen = context.codegen()
    library = codegen.create_library(name)
    library.enable_object_caching()
    library._set_compiled_object(code)
    library._finalize_final_module()
    codegen._engine._defined_symbols.update(entries)
    result = compile_result(
        target_context=context, typing_context=context.typing_context, library=library, environment=environment,
        entry_point=context.get_executable(library, description, environment), fndesc=description,
        type_annotation="", signature=signature, objectmode=False, lifted=(), reload_init=initialisers,
        referenced_envs=environments,
    )  # fmt: skip
    for referenced in environments:
        codegen.set_env(referenced.env_name, referenced)
    return result


def load(context: Any, name: str) -> Any:
    """Load a shipped kernel: numba's CompileResult, or None where it is not there or damaged, which is logged.

    Parameters
    ----------
    context : numba's target context.
    name : what `name_of` returns.
    """
    folder = find()
    entry = None if folder is None else folder.kernels.get(name)
    if folder is None or entry is None:
        return None
    try:
        data = _read(folder.path / name)
        if len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ShippedError(f"the file has {len(data)} bytes and is not the one of {entry.bytes} that was written")
        return _rebuild(context, data)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, compiling makes another
        folder.kernels.pop(name)
        logger.warning("The compiled kernel %s is not used: %s. It is compiled anew.", folder.path / name, error)
        return None


# --- the folder ---------------------------------------------------------------------------------------------------


def _distrust(status: os.stat_result, *, is_parent: bool = False) -> str:
    """Say why code from a file or folder must not be executed; "" if nothing speaks against it.

    Who can write to it can do whatever we may. The owner of this package could do so anyway. A folder above is
    harmless if strangers cannot rename what lies in it.
    """
    if not hasattr(os, "getuid"):
        return ""
    package = PACKAGE.stat()
    if status.st_mode & stat.S_IWOTH and not (is_parent and status.st_mode & stat.S_ISVTX):
        return "anybody may write to it"
    if is_parent:
        return ""
    if status.st_uid not in (0, os.getuid(), package.st_uid):
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & stat.S_IWGRP and status.st_gid not in (0, os.getgid(), package.st_gid):
        return f"group {status.st_gid} may write to it"
    return ""


def _read(path: Path) -> bytes:
    """Read a file that may be trusted."""
    with path.open("rb") as file:
        reason = _distrust(os.fstat(file.fileno()))
        if reason:
            raise ShippedError(reason)
        return file.read()


def _check_folder(path: Path) -> None:
    """Raise unless a folder and those above it may be trusted."""
    real = path.resolve()
    for folder in (real, *real.parents):
        reason = _distrust(folder.stat(), is_parent=folder not in (real, real.parent))
        if reason:
            raise ShippedError(reason if folder == real else f"of {folder}: {reason}")


def _check(made: Made) -> None:
    """Raise unless code that was made so runs here and does what the sources say."""
    if made.format != FORMAT:
        raise ShippedError(f"they are in form {made.format}, this is an edge-runtime for form {FORMAT}")
    if made.sources != digest_sources():
        raise ShippedError("they were made from other sources of edge_kernels")
    here = {"numba": numba.__version__, "llvmlite": llvmlite.__version__, "python": python_tag()}
    for what, version in here.items():
        if getattr(made, what) != version:
            raise ShippedError(f"they were made for {what} {getattr(made, what)}, this is {version}")
    triple = str(llvm.get_process_triple())
    if system_of(made.triple) != system_of(triple):
        raise ShippedError(f"they were made for {made.triple}, this is {triple}")
    missing = set(made.features) - cpu_features()
    if missing:
        raise ShippedError(f"they need {', '.join(sorted(missing))}, which this processor lacks")


def _parse(text: bytes) -> tuple[Made, dict[str, Entry]]:
    """Read a manifest."""
    try:
        found = json.loads(text)
        texts = {name: str(found[name]) for name in Made._fields if name not in ("format", "features")}
        made = Made(format=int(found["format"]), features=[str(name) for name in found["features"]], **texts)
        kernels = {str(name): Entry(int(size), str(digest)) for name, (size, digest) in found["kernels"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShippedError(f"{MANIFEST} is damaged ({type(error).__name__}: {error})") from None
    return made, kernels


def read_folder(path: Path) -> Folder:
    """Check the kernels of one target.

    Raises
    ------
    ShippedError
        If they cannot be used here.
    """
    try:
        _check_folder(path)
        made, kernels = _parse(_read(path / MANIFEST))
    except OSError as error:
        raise ShippedError(f"{error.filename or path}: {error.strerror or error}") from None
    _check(made)
    return Folder(path, kernels)


def _places() -> list[Path]:
    """Folders to look in, each with a folder for every target: the one that the user has named, and the package's."""
    named = os.environ.get(VARIABLE, "")
    if named == "off":
        return []
    package = PACKAGE / "compiled"
    return [*([Path(named).absolute()] if named else []), *([package] if package.is_dir() else [])]


@cache
def find() -> Folder | None:
    """Find the shipped kernels that this process uses; why others are not used is logged, once."""
    for place in _places():
        try:
            if not (place / isa()).is_dir() and place.is_dir():
                there = ", ".join(sorted(entry.name for entry in place.iterdir() if entry.is_dir())) or "none"
                raise ShippedError(f"there are none for {isa()} (there are: {there})")
            return read_folder(place / isa())
        except (ShippedError, OSError) as error:
            logger.warning(
                "The compiled kernels in %s are not used: %s. Kernels are compiled at their first use; "
                "'edge-runtime compile' makes new ones.",
                place / isa(), error,
            )  # fmt: skip
    return None


def has_module(module: str) -> bool:
    """Whether all kernels of a module are shipped; `module` is a name below this package."""
    folder = find()
    return folder is not None and any(name.rpartition(".")[0] == module for name in folder.kernels)
