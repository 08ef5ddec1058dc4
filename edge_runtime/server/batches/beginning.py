"""The beginning of a batch: its input is checked, and opened."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.server.batches.files import FileNotKept
from edge_runtime.server.batches.kept import Kept
from edge_runtime.server.batches.lines import check_file
from edge_runtime.server.batches.records import BatchRecord
from edge_runtime.server.errors import ShuttingDown, problem_of
from edge_runtime.server.settings import Settings

BUSY_S = 0.001
"""How long a file is checked before others have the processor for as long."""


async def validate(
    kept: Kept,
    record: BatchRecord,
    settings: Settings,
    knows: Callable[[str | None], object],
    is_stopping: Callable[[], bool],
) -> None:
    """Check every line of the input; the batch is then in progress, or has failed.

    Parameters
    ----------
    knows : checks the model; raises an `EdgeRuntimeError` when there is none.
    is_stopping : whether to end early; the input is then checked again after the next start.

    Raises
    ------
    OSError
        When the record cannot be written.
    """
    try:
        source = kept.source(record)
        found = await asyncio.to_thread(check_file, source, settings, record.endpoint, on_line=_Breather(is_stopping))
        errors = [error.as_error() for error in found.errors]
        total, model = found.total, found.model
        if not errors:
            await asyncio.to_thread(knows, model)
    except OSError as error:
        errors, total, model = [input_error(error.strerror or "unreadable")], 0, None
    except ShuttingDown:
        return  # checked again after the next start
    except EdgeRuntimeError as error:  # the file is gone, or there is no such model
        problem = problem_of(error)
        errors, total, model = [input_error(problem.message, problem.code)], 0, None
    if kept.records[record.id].status != "validating":
        return  # cancelled meanwhile
    if errors:
        kept.change(record, "failed", errors=tuple(errors))
    else:
        kept.change(record, "in_progress", total=total, model=model)


async def open_work(kept: Kept, record: BatchRecord) -> None:
    """Open the input of a batch that is in progress; without it, the batch fails.

    Raises
    ------
    OSError
        When the record cannot be written.
    """
    try:
        work = kept.work(record)
        await asyncio.to_thread(work.open)
    except (FileNotKept, OSError) as error:
        reason = str(error) if isinstance(error, FileNotKept) else error.strerror or "unreadable"
        kept.change(record, "finalizing", ends_as="failed", errors=(input_error(reason),))
        return
    if kept.records[record.id].status != "in_progress":
        work.close()
        return
    kept.works[record.id] = work


def input_error(message: str, code: str | None = None) -> dict[str, Any]:
    """Why a batch failed: its input as a whole, not one line."""
    return {"code": code or "invalid_input_file", "message": message, "param": None, "line": None}


class _Breather:
    """Lets other threads have the GIL while files are checked: a token takes it many times.

    Parameters
    ----------
    is_stopping : whether to end the work.
    """

    def __init__(self, is_stopping: Callable[[], bool]) -> None:
        self._is_stopping, self._paused = is_stopping, time.perf_counter()

    def __call__(self) -> None:
        if self._is_stopping():
            raise ShuttingDown("The server is shutting down.")
        if time.perf_counter() - self._paused > BUSY_S:
            time.sleep(BUSY_S)
            self._paused = time.perf_counter()
