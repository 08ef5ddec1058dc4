"""The help of every command → docs/cli.md.

    python tools/cli_reference.py

What enters: the program's own commands. What leaves: the whole document; a test compares it with the program.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from edge_runtime.cli import main as program

TARGET = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
COLUMNS = 80
HEADING = """\
# Command line

The help of every command, as the program prints it. `python tools/cli_reference.py` writes this page.
[Getting started](getting-started.md) shows how the commands are used.
"""


def contexts(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[click.Context]:
    """A command and the commands below it, in the order of its own help."""
    context = click.Context(command, parent, name, terminal_width=COLUMNS, **command.context_settings)
    yield context
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None, "a group knows what it lists"
            yield from contexts(found, below, context)


def reference() -> str:
    """Return the text of the document."""
    parts = (
        f"## {context.command_path}\n\n```\n{context.get_help().strip()}\n```\n"
        for context in contexts(program, "edge-runtime")
    )
    return "\n".join([HEADING, *parts])


def main() -> None:
    """Write the document."""
    TARGET.write_text(reference(), "utf-8")
    print("docs/cli.md is written.")


if __name__ == "__main__":
    main()
