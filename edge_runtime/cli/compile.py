"""edge-runtime compile: kernels are compiled ahead of time, for this machine or another."""

from __future__ import annotations

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
    "repeated. This machine's if not given.",
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

    Takes one to two minutes for each instruction set. Code for other machines is made, but never run here; they need
    the same versions of Python, numba and edge-runtime.

    Kernels in the installed package are found by every run; those in another FOLDER, where the environment variable
    EDGE_RUNTIME_COMPILED names it.

    \b
    edge-runtime compile
    edge-runtime compile --target avx2 --target avx512vnni -o kernels
    """
    from edge_kernels.ahead import CompileError, compile_target
    from edge_kernels.machine import isa
    from edge_kernels.shipped import PACKAGE, VARIABLE
    from edge_kernels.targets import TARGETS
    from edge_runtime.cli import terminal as console

    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        raise click.BadParameter(
            f"{unknown[0]!r} is no instruction set with kernels; there are {', '.join(TARGETS)}.",
            param_hint="'--target'",
        )
    if not names:
        check_instruction_set()
    folder = output or PACKAGE / "compiled"
    for name in dict.fromkeys(names or (isa(),)):
        try:
            made = compile_target(name, folder)
        except CompileError as error:
            advice = "" if output else f" With -o FOLDER they are written elsewhere; {VARIABLE} then names it."
            raise BackendUnavailable(f"{error}{advice}") from None
        click.echo(
            f"{made.target}: {made.kernels} kernels, {made.bytes / 1e6:.1f} MB, {made.seconds:.0f} s, {made.folder}"
        )
    if output:
        console.note(f"Runs find them with {VARIABLE}={folder.absolute()}")
