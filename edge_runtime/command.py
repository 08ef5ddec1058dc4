"""What every command of `edge-runtime` has in common: how it ends."""

from __future__ import annotations

from typing import Any

import click

from edge_runtime.errors import EdgeRuntimeError

INTERRUPTED = 130  # what shells report for Ctrl-C


class Command(click.Command):
    """A command whose known errors end with one sentence and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except EdgeRuntimeError as error:
            click.echo(f"edge-runtime: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(INTERRUPTED)
