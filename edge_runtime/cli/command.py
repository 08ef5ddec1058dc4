"""What every command of `edge-runtime` has in common: how it ends."""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import io
import os
import sys
from typing import Any

import click

from edge_runtime.errors import EdgeRuntimeError

INTERRUPTED = 130  # what shells report for Ctrl-C
READER_GONE = 141  # what shells report for SIGPIPE
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class Notes(io.TextIOWrapper):
    """A stderr that drops what cannot be written (full disk, closed pipe): the answer still counts."""

    def write(self, text: str) -> int:
        """Write, if possible."""
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if possible."""
        with contextlib.suppress(OSError):
            super().flush()


def set_up_streams() -> None:
    """Make the standard streams accept any text.

    Files and pipes get UTF-8 on every system; a terminal keeps its encoding, and characters that it cannot show are
    replaced. Closed streams are replaced by the null device: a note must not end an answer.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123 - until the end
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = Notes(sys.stderr.buffer, sys.stderr.encoding, "replace", line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        with contextlib.suppress(io.UnsupportedOperation):  # already read from
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")


def end_quickly() -> None:
    """Leave out Python's last garbage collections: 0.3 s once numba was used. Files are flushed all the same."""

    def leave_garbage() -> None:
        gc.disable()
        gc.freeze()

    atexit.register(leave_garbage)


HELP = {"help_option_names": ["-h", "--help"]}


class Command(click.Command):
    """A command whose known errors end with one sentence and exit code 1."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # click keeps the help option of the first context, so a command must have it without the program, too.
        self.context_settings = {**HELP, **self.context_settings}

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
        except OSError as error:
            ctx.exit(_end_of_output(error))


class Program(click.Group):
    """The program: whatever it prints, help and lists included, may go to a full disk or to a reader that leaves."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command; what is still held back is written before the end, where a failure can be told."""
        code: Any = 0
        try:
            return super().main(*args, **kwargs)
        except SystemExit as end:
            code = end.code
        try:
            sys.stdout.flush()
        except OSError as error:
            code = _end_of_output(error)
        except ValueError:
            pass  # closed
        sys.exit(code)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the arguments; `--help` and `--version` print here."""
        try:
            return super().make_context(*args, **kwargs)
        except OSError as error:
            sys.exit(_end_of_output(error))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; its `--help` prints here."""
        try:
            return super().invoke(ctx)
        except OSError as error:
            sys.exit(_end_of_output(error))


def _end_of_output(error: OSError) -> int:
    """The exit code when stdout takes nothing more; other errors are raised again."""
    if error.errno == errno.EPIPE:
        _let_go_of_output()
        return READER_GONE
    if error.errno not in _FULL:
        raise error
    _let_go_of_output()
    click.echo(f"edge-runtime: The answer cannot be written: {error.strerror}; write it elsewhere.", err=True)
    return 1


def _let_go_of_output() -> None:
    """Send what stdout still holds nowhere, if it cannot be written: Python would complain at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
    except ValueError:
        pass  # closed
