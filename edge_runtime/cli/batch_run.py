"""A batch at work, as a person sees it: progress, Ctrl-C, a sentence at the end, an exit code."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import click

from edge_runtime.batch.items import Item, Source
from edge_runtime.batch.output import Output
from edge_runtime.batch.runner import ORDERED_AHEAD, Runner, in_order, pending
from edge_runtime.batch.work import write_all
from edge_runtime.cli import terminal as console
from edge_runtime.cli.batch_progress import BatchProgress, clock, rate_of


def run_batch(
    source: Source,
    answer: Callable[[Item], Any],
    cancel: Callable[[], None],
    line_of: Callable[[Item, Any], bytes],
    output: Output,
    n_at_work: int,
    *,
    ordered: bool,
) -> int:
    """Answer every item that has no line yet here, and say how it went; returns the exit code."""
    from edge_runtime.batch.runner import Runner

    def here(items: Iterator[Item]) -> Runner:
        return Runner(items, answer, n_at_work, ORDERED_AHEAD if ordered else None)

    return run(source, here, cancel, line_of, output, ordered=ordered)


def run(
    source: Source,
    runner_of: Callable[[Iterator[Item]], Any],
    cancel: Callable[[], None],
    line_of: Callable[[Item, Any], bytes],
    output: Output,
    *,
    ordered: bool = False,
) -> int:
    """As `run_batch`, by any runner: what has `results` and `stop`."""
    from edge_runtime.cli.batch_progress import BatchProgress

    progress = BatchProgress(source)
    items = pending(source, output, progress.skip)
    runner = runner_of(items)
    results = in_order(runner.results()) if ordered else runner.results()
    with ending(runner.stop, progress) as caught:
        try:
            write_all(results, output, line_of, progress.line, lambda: bool(caught))
        except BaseException:
            runner.stop()
            cancel()
            raise
        finally:
            progress.clear()
            _tell(progress, output)
    if caught:
        return 128 + caught[0]
    return 1 if output.n_errors else 0


@contextlib.contextmanager
def ending(stop: Callable[[], None], progress: BatchProgress) -> Iterator[list[int]]:
    """The first Ctrl-C, or SIGTERM, ends after the items at work, the second at once; yields the signals caught."""
    caught: list[int] = []

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if len(caught) > 1:
            raise KeyboardInterrupt
        stop()
        progress.note = "; ending after the items at work, Ctrl-C ends at once"
        progress.clear()
        click.secho("Ending after the items at work; Ctrl-C again ends at once.", err=True, dim=True)

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(progress: BatchProgress, output: Output) -> None:
    seconds = progress.seconds()
    parts = [f"{progress.n_lines - progress.n_failed:,} answered"]
    if progress.n_failed:
        parts.append(f"{progress.n_failed:,} failed")
    if progress.n_before:
        parts.append(f"{progress.n_before:,} done before")
    rate = f", {rate_of(progress.n_lines / seconds)}" if progress.n_lines and seconds > 0 else ""
    console.note(f"{', '.join(parts)} in {clock(seconds)}{rate}: {output.path}")
    if output.n_errors:
        console.note(
            f"Of all lines, {output.n_errors:,} are failures: their field 'error' says why; --retry-failed tries "
            "them again."
        )
