"""Results → lines of the output; what ends a batch early."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from edge_runtime.answers import Answer
from edge_runtime.batch.items import Failure, Item
from edge_runtime.batch.output import Output
from edge_runtime.errors import EdgeRuntimeError

GIVE_UP_AFTER = 32
"""Failures that may pass, one after the other: then whatever answers is away."""


class NothingAnswers(EdgeRuntimeError):  # noqa: N818 - says what is the matter
    """Everything fails for a reason that may pass; what failed last was not written, so that it is tried again."""


def write_all(
    results: Iterable[tuple[Item, Any] | None],
    output: Output,
    line_of: Callable[[Item, Any], bytes],
    on_line: Callable[[bool | None], None] = lambda is_error: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Write a line for every result.

    Failures that may pass, and others after them, are held back until something succeeds: when a server is away, ten
    thousand items must not be recorded as failed.

    Parameters
    ----------
    results : items and results; None now and then while there is none.
    on_line : called after each line with whether it is a failure, and with None while there is none.
    is_stopped : whether the end of the results is not that of the items: what is held back is then tried again by
        the next run.

    Raises
    ------
    OutputError
        When a line cannot be written; those before are.
    NothingAnswers
        When `GIVE_UP_AFTER` items in a row fail for reasons that may pass.
    Exception
        Whatever `results` raised.
    """
    held: list[tuple[Item, Any]] = []
    n_passing = 0

    def write(item: Item, found: Any) -> None:
        is_error = not is_answer(found)
        output.append(line_of(item, found), is_error=is_error)
        on_line(is_error)

    for pair in results:
        if pair is None:
            on_line(None)
            continue
        item, found = pair
        if isinstance(found, Answer) and found.finish_reason == "cancelled":
            continue  # by a second Ctrl-C
        passes = isinstance(found, Failure) and found.may_pass
        if passes or (held and not is_answer(found)):
            held.append((item, found))
            n_passing += passes
            if n_passing >= GIVE_UP_AFTER:
                raise NothingAnswers(
                    f"{len(held)} items in a row failed, the last one with: {found.reason} They are not recorded: "
                    "run the same command again when that has passed."
                )
            continue
        for earlier in held:
            write(*earlier)
        held, n_passing = [], 0
        write(item, found)
    for earlier in [] if is_stopped() else held:
        write(*earlier)
    output.sync()


def is_answer(found: Any) -> bool:
    """Whether a result is one: an `Answer`, or whatever says of itself that it is (`is_answer`)."""
    return isinstance(found, Answer) or bool(getattr(found, "is_answer", False))
