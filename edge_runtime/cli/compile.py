"""edge-runtime compile: kernels are compiled ahead of time, for this machine or another."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from edge_runtime.cli.command import Command
from edge_runtime.errors import BackendUnavailable
from edge_runtime.vision.arithmetic import check_instruction_set


@click.command("compile", cls=Command)
@click.option(
    "--target",
    "names",
    multiple=True,
    metavar="NAME",
    help="Instruction set: avx2, avxvnni, avx512, avx512vnni, amx, neon, neon-dot, neon-i8mm or portable; may be "
    "repeated; all: those of this machine's family. This machine's if not given.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Where to write FOLDER/NAME; into the installed package if not given.",
)
def compile_kernels(names: tuple[str, ...], output: Path | None) -> None:
    """Compile the kernels ahead of time: no run then waits for the compiler.

    Takes one to two minutes of a core for each instruction set. Code for other machines is made, but never run here;
    they need the same versions of Python, numba and edge-runtime.

    Kernels in the installed package are found by every run; those in another FOLDER, where the environment variable
    EDGE_RUNTIME_COMPILED names it.

    \b
    edge-runtime compile
    edge-runtime compile --target avx2 --target avx512vnni -o kernels
    """
    from edge_kernels.ahead import CompileError, compile_target
    from edge_kernels.machine import cpu_count, isa
    from edge_kernels.shipped import PACKAGE, VARIABLE
    from edge_kernels.targets import TARGETS, family
    from edge_runtime.cli import terminal as console

    if names == ("all",):
        names = tuple(name for name, target in TARGETS.items() if target.family == family())
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        raise click.BadParameter(
            f"{unknown[0]!r} is no instruction set with kernels; there are {', '.join(TARGETS)}; or all.",
            param_hint="'--target'",
        )
    if not names:
        check_instruction_set()
    folder = output or PACKAGE / "compiled"
    pool, errors = ThreadPoolExecutor(cpu_count()), []  # each of its threads waits for a process
    try:
        for work in [pool.submit(compile_target, name, folder) for name in dict.fromkeys(names or (isa(),))]:
            try:
                made = work.result()
            except CompileError as error:
                errors.append(str(error))
                continue
            size = f"{made.kernels} kernels, {made.bytes / 1e6:.1f} MB"
            click.echo(f"{made.target}: {size}, {made.seconds:.0f} s, {made.folder}")
    finally:
        pool.shutdown(cancel_futures=True)
    if errors:
        if not output and not os.access(PACKAGE, os.W_OK):
            errors.append(f"With -o FOLDER they are written elsewhere; {VARIABLE} then names it.")
        raise BackendUnavailable(" ".join(errors))
    if output:
        console.note(f"Runs find them with {VARIABLE}={folder.absolute()}")
