"""Compile the kernels of a target ahead of time, for `shipped` to load there.

What enters: the name of a target (`targets`) and a folder. What leaves: FOLDER/<target>, with a file for every kernel
and callback that runs on such a machine, and a manifest.

Each target is compiled in a process of its own, since the instruction set is chosen when modules are imported. In it
numba has a code generator that emits object files and links nothing, so code for other processors is never run:

    kernels, types of their arguments ──numba──→ LLVM IR ──`ObjectCodegen`──→ object files ──`shipped.pack`──→ FOLDER
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from edge_kernels import machine, targets

MODULES = (
    "ggml_backend.compiled",  # first: what callbacks call becomes part of them
    "attention.float32",
    "attention.int16",
    "linear.float32",
    "linear.int8",
    "linear.int8_rows",
    "linear.int8_weights",
    "rows.norm",
)
"""Modules whose kernels run on every machine; of those that they call, theirs are compiled into them."""
TILED_MODULES = (
    "attention.bf16",
    "attention.causal",
    "attention.qkv_fused",
    "linear.bf16_split",
    "linear.gguf_blocks",
    "rows.decoder_rows",
)
"""Modules whose kernels run where there are tiles only (AMX)."""
FIRST_IDENTITY = 1 << 32
"""numba numbers functions and puts the number into the names of symbols; those compiled at run time start at 1."""


class CompileError(Exception):
    """Kernels that could not be compiled, or not be written; the text is a sentence."""


class Compiled(NamedTuple):
    """What was made for a target."""

    target: str
    folder: Path
    kernels: int
    bytes: int
    seconds: float


def compile_target(target: str, folder: Path, *, only: tuple[str, ...] = ()) -> Compiled:
    """Compile all kernels of a target into FOLDER/<target>, which is replaced when all of them are there.

    Takes one to two minutes on one core, and 1 GB of memory.

    Parameters
    ----------
    target : str
        A key of `targets.TARGETS`.
    folder : Path
        Made if needed.
    only : tuple of str
        Kernels to compile, by the names of `shipped.name_of`; all if empty.

    Raises
    ------
    CompileError
        If there is no such target, the compiler fails, or the folder cannot be written.
    """
    if target not in targets.TARGETS:
        raise CompileError(f"There is no target {target!r}; there are {', '.join(targets.TARGETS)}.")
    started = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target}-", dir=folder))
    except OSError as error:
        raise CompileError(f"{folder} cannot be written: {error.strerror or error}.") from None
    try:
        _run(target, unfinished, only)
        unfinished.chmod(0o755)  # mkdtemp's is for its owner alone
        sizes = [file.stat().st_size for file in unfinished.iterdir()]
        _put_in_place(unfinished, folder / target)
    except OSError as error:
        raise CompileError(f"{folder / target} cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Compiled(target, folder / target, len(sizes) - 1, sum(sizes), time.monotonic() - started)


def _put_in_place(made: Path, place: Path) -> None:
    """Rename a finished folder; one that is there already is removed after that."""
    old = made.with_name(f"{made.name}-old")
    with contextlib.suppress(FileNotFoundError):
        place.rename(old)
    made.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _environment(target: str) -> dict[str, str]:
    """Variables of the process that compiles: no settings of numba but ours, and always the same order of sets."""
    cpu, features = targets.processor(target)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {
        "EDGE_RUNTIME_ISA": target,
        "NUMBA_CPU_NAME": cpu,
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_DISABLE_INTEL_SVML": "1",  # a library that the other machine need not have
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(path),
    }


def _run(target: str, folder: Path, only: tuple[str, ...]) -> None:
    """Compile in another process."""
    command = [sys.executable, "-c", "from edge_kernels.ahead import main; main()", target, str(folder), *only]
    done = subprocess.run(command, env=_environment(target), capture_output=True, text=True, errors="replace")
    if done.returncode:
        end = (
            f"signal {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"status {done.returncode}"
        )
        said = done.stderr.strip().splitlines()[-1:] or ["It said nothing."]
        raise CompileError(f"Compiling for {target} ended with {end}: {said[0]}")


# --- in the process that compiles ---------------------------------------------------------------------------------


def main() -> None:
    """Compile for one target: the process that `compile_target` starts."""
    target, folder, only = sys.argv[1], Path(sys.argv[2]), frozenset(sys.argv[3:])
    machine.only_compile()
    _emit_objects(targets.triple(target))
    results = _compile_all(target, only)
    unknown = only - results.keys()
    if unknown:
        raise SystemExit(f"There is no kernel {', '.join(sorted(unknown))} for {target}.")
    _write(target, folder, results)


def _emit_objects(triple: str) -> None:
    """Make numba generate code for a triple without linking it into this process."""
    from llvmlite import binding as llvm
    from numba.core import bytecode, codegen, config

    class ObjectLibrary(codegen.CPUCodeLibrary):  # type: ignore[misc]
        """A library that becomes an object file."""

        def _finalize_specific(self) -> None:
            pass

        def get_pointer_to_function(self, name: str) -> int:
            """Return a number that is no address: nothing here is ever called."""
            return 1

        def object_code(self) -> bytes:
            """Return the object file."""
            return bytes(self._codegen._tm.emit_object(self._final_module))

    class ObjectCodegen(codegen.JITCPUCodegen):  # type: ignore[misc]
        """Options, passes and names as numba's code generator for this process has them, so that it can link them."""

        _library_class = ObjectLibrary

        def _init(self, llvm_module: Any) -> None:
            llvm.initialize_all_targets()
            llvm.initialize_all_asmprinters()
            self._tm_features = self._customize_tm_features()
            options: dict[str, Any] = {"opt": config.OPT}
            self._customize_tm_options(options)
            if not triple.startswith("x86_64"):
                options["reloc"] = "default"
            self._tm = llvm.Target.from_triple(triple).create_target_machine(**options)
            self._target_data = self._tm.target_data
            self._data_layout = str(self._target_data)
            self._loopvect, self._opt_level = False, 0  # of the first passes, before reference counts are pruned

        def _create_empty_module(self, name: str) -> Any:
            module = super()._create_empty_module(name)
            module.triple = triple
            return module

        def _add_module(self, module: Any) -> None:
            pass

        def set_env(self, env_name: str, env: Any) -> None:
            pass

    codegen.JITCPUCodegen = ObjectCodegen
    bytecode.FunctionIdentity._unique_ids = itertools.count(FIRST_IDENTITY)


def _compile_all(target: str, only: frozenset[str]) -> dict[str, Any]:
    """Compile kernels and callbacks; return name → numba's result."""
    from edge_kernels import compile as compilation
    from edge_kernels.shipped import name_of
    from edge_kernels.signatures import argument_types

    results: dict[str, Any] = {}
    callees: set[str] = set()
    wanted = ""  # the kernel that is asked for; what is compiled besides is what it calls, and becomes part of it

    def record(name: str, result: Any) -> None:
        if result.library.has_dynamic_globals:
            raise SystemExit(f"{name} holds addresses of this process, so it cannot be shipped.")
        results[name] = result
        if name != wanted and not name.startswith(MODULES[0]):
            callees.add(name)

    compilation.recorder = record
    modules = (*MODULES, *(TILED_MODULES if target == "amx" else ()))
    for module in modules:
        if not only or any(name.startswith(f"{module}.") for name in only):
            importlib.import_module(f"edge_kernels.{module}")
    for kernel in list(compilation._kernels):
        wanted = name_of(kernel.py_func)
        if wanted.rpartition(".")[0] in modules and (not only or wanted in only) and not kernel.overloads:
            kernel.compile(argument_types(kernel.py_func))
    return {name: result for name, result in results.items() if name not in callees and (not only or name in only)}


def _write(target: str, folder: Path, results: dict[str, Any]) -> None:
    """Write a file for each result, then the manifest."""
    import llvmlite
    import numba

    from edge_kernels import shipped

    kernels = {}
    for name, result in sorted(results.items()):
        data = shipped.pack(result, result.library.object_code())
        (folder / name).write_bytes(data)
        kernels[name] = shipped.Entry(len(data), hashlib.sha256(data).hexdigest())
    made = shipped.Made(
        shipped.FORMAT, shipped.digest_sources(), numba.__version__, llvmlite.__version__, shipped.python_tag(),
        targets.triple(target), targets.processor(target)[0], sorted(targets.TARGETS[target].features),
    )  # fmt: skip
    text = json.dumps({**made._asdict(), "target": target, "kernels": kernels}, indent=1)
    (folder / shipped.MANIFEST).write_text(text + "\n", "utf-8")
