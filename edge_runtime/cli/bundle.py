"""edge-runtime bundle: a model and this program in one file, for machines without network."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edge_runtime.cli.command import Command
from edge_runtime.errors import BundleError


@click.command("bundle", cls=Command)
@click.option(
    "-m", "--model", default="demo", metavar="MODEL", help="demo, a pulled model, a folder or a file.  [demo]"
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="BUNDLE.tar", help="File to write."
)
@click.option(
    "--mmproj", type=click.Path(path_type=Path), metavar="FILE", help="mmproj file, if not beside the decoder."
)
@click.option("--target", metavar="TARGET", help="linux-x86_64 or linux-aarch64.  [this machine]")
@click.option("--python", metavar="VERSION", help="Python of the target, such as 3.12.  [this one]")
@click.option(
    "--extra", "extras", multiple=True, metavar="NAME", help="serve, pdf, video, heif; or none.  [installed]"
)
@click.option(
    "--kernels",
    multiple=True,
    metavar="NAME",
    help="Instruction set to compile kernels for, as in 'compile'; may be repeated; all; or none.  [this machine's]",
)
@click.option(
    "--wheels", type=click.Path(path_type=Path), metavar="FOLDER", help="Take wheels from here before any other."
)
@click.option("--name", metavar="NAME", help="What the model is called once installed.  [its own name]")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def bundle(output: Path, extras: tuple[str, ...], kernels: tuple[str, ...], force: bool, **wanted: Any) -> None:
    """Write a file that installs this program with a model where there is neither network nor compiler.

    It holds wheels, compiled kernels, the model, checksums, licences and an install script. There:

    \b
    tar -xf BUNDLE.tar && sh edge-runtime-*/install.sh [PREFIX]

    For this kind of machine and this Python, the wheels are made of what is installed here, and nothing is fetched.
    For others, pip fetches them; llama-cpp-python for that machine has to be in --wheels FOLDER.
    """
    from edge_runtime.bundle.make import Wanted, make_bundle
    from edge_runtime.cli import terminal as console

    request = Wanted(extras=_chosen(extras), kernels=_chosen(kernels), **wanted)
    made = make_bundle(request, output, compile_kernels, console.note, force=force)
    for sentence in made.notes:
        console.note(sentence)
    click.echo(f"{made.path}  {made.path.stat().st_size / 1e6:.1f} MB")


def _chosen(words: tuple[str, ...]) -> tuple[str, ...] | None:
    """What was said; None for nothing, and nothing for `none`."""
    return None if not words else () if words == ("none",) else words


def compile_kernels(target: str, wanted: Sequence[str] | None, folder: Path) -> list[str]:
    """Compile kernels for a target ahead of time, or take what was compiled for this machine before.

    Parameters
    ----------
    target : linux-x86_64 or linux-aarch64.
    wanted : instruction sets, or `all`; None: this machine's for a target of its family, else all.

    Returns
    -------
    names : of the instruction sets that FOLDER/NAME has kernels for.
    """
    from edge_kernels.ahead import CompileError, compile_target
    from edge_kernels.machine import isa
    from edge_kernels.shipped import PACKAGE, ShippedError, read_folder
    from edge_kernels.targets import TARGETS, family
    from edge_runtime.cli import terminal as console

    possible = [name for name, each in TARGETS.items() if each.family == target.removeprefix("linux-")]
    is_family = target == f"linux-{family()}"
    if wanted is None:
        names = [isa()] if is_family else possible
    else:
        names = possible if [*wanted] == ["all"] else [*dict.fromkeys(wanted)]
    for name in names:
        if name not in possible and not (is_family and name == isa()):
            raise BundleError(
                f"--kernels is {name!r}; for {target} expected all, none, or any of {', '.join(possible)}."
            )
    for number, name in enumerate(names, 1):
        made = PACKAGE / "compiled" / name
        try:
            read_folder(made)
        except ShippedError:  # there is none, it is of other sources, or cannot run here
            console.note(f"Compiling the kernels for {name}, {number} of {len(names)}, one to two minutes.")
            try:
                compile_target(name, folder)
            except CompileError as error:
                raise BundleError(str(error)) from None
        else:
            shutil.copytree(made, folder / name)
    return names
