"""Waiting is shown: a line that moves every second, and a count of compiled kernels."""

from __future__ import annotations

import re
import threading

import numba
import pytest

from edge_runtime.cli import progress_line
from edge_runtime.cli.progress_line import ProgressLine, compiled_kernels, waiting


def be_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what captures stderr in a test, not before it, say that it is a terminal."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(progress_line, "REDRAW_S", 0.01)


class Clock:
    """A second later whenever it is asked."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now


def test_the_line_moves_while_nothing_happens(monkeypatch, capsys):
    be_a_terminal(monkeypatch)
    monkeypatch.setattr(progress_line, "time", Clock())
    drawn = threading.Semaphore(0)
    draw = ProgressLine._draw
    monkeypatch.setattr(ProgressLine, "_draw", lambda line: (draw(line), drawn.release()))
    line = ProgressLine("scan.pdf: ")
    line.show("reading")
    for _ in range(4):
        assert drawn.acquire(timeout=60)
    line.clear()
    seen = capsys.readouterr().err
    seconds = [int(found) for found in re.findall(r"scan\.pdf: reading, (\d+) s", seen)]
    assert seconds[:4] == [1, 2, 3, 4]
    assert seen.endswith("\r\x1b[K")


def test_what_was_erased_stays_away(monkeypatch, capsys):
    be_a_terminal(monkeypatch)
    before = set(threading.enumerate())
    with waiting("loading the model"):
        assert "loading the model" in capsys.readouterr().err
        (redrawing,) = set(threading.enumerate()) - before
    redrawing.join(60)
    assert not redrawing.is_alive()
    assert capsys.readouterr().err.endswith("\r\x1b[K")


def test_nothing_is_shown_on_a_pipe(capsys):
    with waiting("loading the model"):
        pass
    assert capsys.readouterr().err == ""


def test_compiled_kernels_are_counted():
    def doubled(x):
        return x + x

    doubled.__module__ = "edge_kernels.test"
    told: list[int] = []
    function = numba.njit(doubled)
    with compiled_kernels(told.append):
        assert function(2) == 4
        assert function(2) == 4
        assert numba.njit(lambda x: x)(1) == 1
    function(2.5)
    assert told == [1]
