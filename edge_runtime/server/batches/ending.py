"""The end of a batch: lines without answers get errors, and what was written becomes files."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

from edge_runtime.server.batches import lines
from edge_runtime.server.batches.files import FileNotKept
from edge_runtime.server.batches.kept import Kept
from edge_runtime.server.batches.lines import LineRefused
from edge_runtime.server.batches.records import BatchRecord, FileRecord, new_id, now_ns
from edge_runtime.server.batches.work import ERRORS, OUTPUT, Appended, Work


async def finish(kept: Kept, record: BatchRecord) -> None:
    """Make files of the answers, and end a batch; what a kill interrupts is done again.

    Raises
    ------
    OSError
        When the disk is full, for example; call it again later.
    """
    if record.output_file_id is None:  # otherwise all lines are written, and the files may have been moved
        has_rest = record.ends_as in ("expired", "cancelled")
        if record.id not in kept.works and record.total:
            await _open_for_the_end(kept, record)
        work = kept.works.get(record.id)
        if work is not None:
            if has_rest:
                await asyncio.to_thread(put_rest, work, record)
            record = kept.counted(record)
        output, errors = new_id("file-"), new_id("file-")
        record = kept.change(record, record.status, output_file_id=output, error_file_id=errors)
        if work is not None:
            work.close()
            del kept.works[record.id]
    found = [
        await asyncio.to_thread(_as_file, kept, record, kind, name)
        for kind, name in ((OUTPUT, record.output_file_id), (ERRORS, record.error_file_id))
    ]
    kept.change(record, record.ends_as, output_file_id=found[0], error_file_id=found[1])


async def _open_for_the_end(kept: Kept, record: BatchRecord) -> None:
    """Open a batch that came to its end before it was opened since the start of the server."""
    with contextlib.suppress(FileNotKept, OSError):
        work = kept.work(record)
        await asyncio.to_thread(work.open)
        kept.works[record.id] = work


def _as_file(kept: Kept, record: BatchRecord, kind: str, name: str | None) -> str | None:
    """Move the lines of a batch among the files; returns the id, None if there are no lines."""
    assert name is not None
    path = kept.folder / f"{record.id}{kind}"
    seconds = record.output_seconds
    created = now_ns()
    expires_at = None if seconds is None else created // 10**9 + seconds
    shown = f"{record.id}_{kind[1:]}.jsonl"
    made = FileRecord(name, record.owner, shown, "batch_output", 0, created, expires_at)
    target = kept.files.path(made)
    if path.exists() and not path.stat().st_size:
        path.unlink()  # nothing fitted on the disk
    if path.exists() and not target.exists():
        Appended(path).finish()
        path.replace(target)
    if not target.exists():
        return None
    kept.files.put(replace(made, n_bytes=target.stat().st_size))
    return name


def put_rest(work: Work, record: BatchRecord) -> None:
    """Write an error for every line that gets no answer any more.

    Raises
    ------
    OSError
        When one could not be written; call it again later.
    """
    if record.ends_as == "cancelled":
        code, message = "batch_cancelled", "This request could not be executed before the batch was cancelled."
    else:
        code = "batch_expired"
        message = "This request could not be executed before the completion window expired."
    with contextlib.suppress(LineRefused):
        while (line := work.take()) is not None:
            try:
                work.put(line, lines.error_line(line.custom_id, code, message), is_answer=False, has_reply=False)
            except OSError:
                work.give_back(line)
                raise
