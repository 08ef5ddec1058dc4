"""edge-runtime bundle: a model and this program in one file, for machines without network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edge_runtime.cli.command import Command


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
    "--wheels", type=click.Path(path_type=Path), metavar="FOLDER", help="Take wheels from here before any other."
)
@click.option("--name", metavar="NAME", help="What the model is called once installed.  [its own name]")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def bundle(output: Path, extras: tuple[str, ...], force: bool, **wanted: Any) -> None:
    """Write a file that installs this program with a model where there is neither network nor compiler.

    It holds wheels, compiled kernels, the model, checksums, licences and an install script. There:

    \b
    tar -xf BUNDLE.tar && sh edge-runtime-*/install.sh [PREFIX]

    For this kind of machine and this Python, the wheels are made of what is installed here, and nothing is fetched.
    For others, pip fetches them; llama-cpp-python for that machine has to be in --wheels FOLDER.
    """
    from edge_runtime.bundle.make import Wanted, make_bundle
    from edge_runtime.cli import terminal as console

    chosen = None if not extras else () if extras == ("none",) else extras
    request = Wanted(extras=chosen, **wanted)
    made = make_bundle(request, output, compile_kernels, console.note, force=force)
    for sentence in made.notes:
        console.note(sentence)
    click.echo(f"{made.path}  {made.path.stat().st_size / 1e6:.1f} MB")


def compile_kernels(target: str, folder: Path) -> Sequence[str]:
    """Compile the kernels for a target ahead of time; returns the instruction sets that there is code for."""
    return []
