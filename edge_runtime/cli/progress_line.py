"""One line on stderr that shows what is waited for; drawn again every second, so that a person sees that it goes on.

Nothing is shown unless stderr is a terminal and the command is not quiet.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from edge_runtime.cli.output_level import is_quiet

REDRAW_S = 1.0


class ProgressLine:
    """The line; any thread may show a text, and the time since the first one stands behind it.

    Parameters
    ----------
    label : what the line begins with.
    """

    def __init__(self, label: str = "") -> None:
        self._label, self.text = label, ""
        self._live = sys.stderr.isatty() and not is_quiet()
        self._lock = threading.Lock()
        self._ended: threading.Event | None = None
        self._since = 0.0

    def show(self, text: str) -> None:
        """Replace the line."""
        with self._lock:
            self.text = text
            if not self._live:
                return
            if self._ended is None:
                self._since, self._ended = time.monotonic(), threading.Event()
                threading.Thread(target=self._redraw, args=(self._ended,), daemon=True).start()
            self._draw()

    def clear(self) -> None:
        """Erase the line; nothing is drawn until the next text."""
        with self._lock:
            if self._ended is not None:
                self._ended.set()
                self._ended = None
                click.echo("\r\x1b[K", err=True, nl=False)

    def _redraw(self, ended: threading.Event) -> None:
        while not ended.wait(REDRAW_S):
            with self._lock:
                if not ended.is_set():
                    self._draw()

    def _draw(self) -> None:
        seconds = int(time.monotonic() - self._since)
        waited = f", {seconds} s" if seconds else ""
        click.echo(f"\r\x1b[K\x1b[2m{self._label}{self.text}{waited}\x1b[0m", err=True, nl=False)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a text while the block runs."""
    line = ProgressLine()
    line.show(text)
    try:
        yield
    finally:
        line.clear()


@contextmanager
def compiled_kernels(tell: Callable[[int], None]) -> Iterator[None]:
    """Call `tell` with the number of kernels that were compiled since the block began, after each; any thread's.

    What is read from the cache is not counted, nor are other libraries' functions.
    """
    from numba.core import event

    class Count(event.Listener):  # type: ignore[misc]
        n_compiled = 0

        def on_start(self, event: event.Event) -> None:
            """A function is going to be compiled."""

        def on_end(self, event: event.Event) -> None:
            """A function was compiled."""
            function = getattr((event.data or {}).get("dispatcher"), "py_func", None)
            if getattr(function, "__module__", "").startswith("edge_kernels"):
                self.n_compiled += 1
                tell(self.n_compiled)

    count = Count()
    event.register("numba:compile", count)
    try:
        yield
    finally:
        event.unregister("numba:compile", count)
