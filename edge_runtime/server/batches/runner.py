"""All batches of a server: created, worked through while nobody waits for an answer, cancelled, kept across restarts.

One task of the event loop takes lines from the batches in turn, oldest batch first, and has a few of them answered at
the same time by the application in this process, as requests that give way (`shares.Background`). A line is at hand
until its answer is on disk; when the server ends, or a person's request needs the memory of the model, it goes back.

One process at a time works in the folder, by a lock that the system releases however the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from starlette.types import ASGIApp

from edge_runtime.errors import EdgeRuntimeError, StoreFull
from edge_runtime.server.batches import lines
from edge_runtime.server.batches.files import FileNotKept, Files
from edge_runtime.server.batches.lines import Line, LineRefused, check_file
from edge_runtime.server.batches.records import BatchRecord, FileRecord, new_id, now_ns, read_all, write
from edge_runtime.server.batches.work import ERRORS, OUTPUT, Appended, Work
from edge_runtime.server.errors import RequestError, ServerError, ShuttingDown, problem_of
from edge_runtime.server.middleware.shares import Background
from edge_runtime.server.settings import Settings
from edge_runtime.store.download import storing
from edge_runtime.store.names import visible
from edge_runtime.system.atomic_files import make_folder

logger = logging.getLogger("edge_runtime.server")

AT_ONCE = 4
"""Lines that are answered at the same time: half the sequences of a model."""
OPEN_BATCHES = 4
"""Batches whose lines are taken in turn; later ones wait."""
MAX_UNFINISHED = 100
"""Batches of all clients together."""
MAX_BATCHES = 10_000
"""Records of all clients together; beyond that, the oldest of those that have ended are forgotten."""
LOOK_S = 0.05
"""Pause between looks whether somebody waits for an answer."""
IDLE_S = 1.0
"""Pause between looks for batches whose time is over."""
TIDY_S = 60.0
RETRIED = frozenset({429, 503, 507})
"""Statuses that may pass: no memory, no room on the disk."""
RETRY_S = (1.0, 5.0, 15.0, 30.0, 60.0)
"""Pauses before a line is tried again; after the last one its error is its answer."""
BUSY_S = 0.001
"""How long a file is checked before others have the processor for as long."""
FULL_S = 10.0
"""Pause before an answer is written again to a full disk."""


class BatchNotKept(ServerError):  # noqa: N818 - says what is the matter
    """No batch has this id, or it is another client's."""

    status, param = 404, "id"


class InUse(ServerError):  # noqa: N818 - says what is the matter
    """Another process works in the folder."""

    status, code = 503, "files_in_use"


class NotCancellable(ServerError):  # noqa: N818 - says what is the matter
    """The batch has ended."""

    status = 409


class Batches:
    """Files and batches of one server.

    Parameters
    ----------
    root : their folder; created when a client first needs it.
    app : answers the lines.
    is_asked : whether anybody waits for an answer.
    knows : checks the model of a batch; raises an `EdgeRuntimeError` when there is none.
    """

    def __init__(
        self,
        root: Path,
        settings: Settings,
        app: ASGIApp,
        is_asked: Callable[[], bool],
        knows: Callable[[str | None], object] = lambda model: None,
    ) -> None:
        self.root, self._settings, self._app, self._is_asked, self._knows = root, settings, app, is_asked, knows
        self._folder = root / "batches"
        self._records: dict[str, BatchRecord] = {}
        self._needed: dict[str, str] = {}
        """Input file → batch that reads it."""
        self.files = Files(root / "files", settings, self._needed.__contains__)
        self._works: dict[str, Work] = {}
        self._held: FileLock | None = None
        self._opening = threading.Lock()
        self._running: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._at_hand: dict[asyncio.Task[None], str] = {}
        """Lines that are being answered, with their batches."""
        self._stopping = False
        self.n_answered = {True: 0, False: 0}
        """Lines since the start: with answers, and without."""

    # --- opening and closing ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to work, in the event loop, if there is anything here from before."""
        self._running = asyncio.create_task(self._run())

    async def opened(self) -> Batches:
        """Take possession of the folder, if that has not happened yet.

        Raises
        ------
        InUse
            When another process has it.
        StoreError
            When it cannot be written to.
        """
        if self._held is None:
            await asyncio.to_thread(self._open)
            self._wake.set()
        return self

    def _open(self) -> None:
        with self._opening:
            if self._held is not None:
                return
            lock = FileLock(self.root / "lock", thread_local=False, mode=0o600)
            with storing(self.root, "try again"):
                for folder in (self.root, self._folder, self.files.folder):
                    make_folder(folder, 0o700)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    raise InUse(
                        "Another server of this machine keeps the files and batches here; ask that one, or start "
                        "this one with another store (EDGE_RUNTIME_MODELS)."
                    ) from None
            try:
                self._load()
            except BaseException:
                lock.release()
                raise
            self._held = lock

    def _load(self) -> None:
        self._records = read_all(self._folder, BatchRecord)
        unfinished = [record for record in self._records.values() if record.is_unfinished]
        self._needed |= {record.input_file_id: record.id for record in unfinished}
        promised = {
            name
            for record in unfinished
            for name in (record.output_file_id, record.error_file_id)
            if name is not None
        }
        self.files.open(promised)
        if unfinished:
            logger.info("%d batches go on where they were.", len(unfinished))

    def stop(self) -> None:
        """Return what is at hand: the server is ending."""
        self._stopping = True
        self.withdraw()

    def withdraw(self) -> None:
        """Return what is at hand; it is answered later."""
        for task in [*self._at_hand]:
            task.cancel()

    async def close(self) -> None:
        """End the work, and let others have the folder."""
        self.stop()
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        if self._at_hand:
            await asyncio.wait([*self._at_hand])
        for work in self._works.values():
            work.close()
        self._works.clear()
        if self._held is not None:
            self._held.release()
            self._held = None

    # --- what clients do --------------------------------------------------------------------------------------

    def get(self, owner: str, name: str, prefix: str = "batch_") -> BatchRecord:
        """A batch of this owner, with the numbers of this moment.

        Raises
        ------
        BatchNotKept
        """
        record = self._records.get(name)
        if record is None or record.owner != owner or not name.startswith(prefix):
            raise BatchNotKept(f"No batch has the id {visible(name[:80])!r}; ask for the list of batches.")
        return self._counted(record)

    def all(self, owner: str, prefix: str = "batch_") -> list[BatchRecord]:
        """Batches of this owner, oldest first."""
        found = [record for record in [*self._records.values()] if record.owner == owner]
        return [self._counted(record) for record in found if record.id.startswith(prefix)]

    def _counted(self, record: BatchRecord) -> BatchRecord:
        work = self._works.get(record.id)
        return record if work is None else _with_counts(record, work)

    def create(self, record: BatchRecord) -> BatchRecord:
        """Start a batch; its input is checked soon.

        Raises
        ------
        FileNotKept, RequestError, StoreFull, StoreError
        """
        source = self.files.get(record.owner, record.input_file_id)
        if (other := self._needed.get(source.id)) is not None:
            raise RequestError(
                f"The file {source.id} is read by the batch {other}, which has not ended; wait for it or upload the "
                "file again.",
                "input_file_id",
            )
        unfinished = sum(each.is_unfinished for each in self._records.values())
        if unfinished >= MAX_UNFINISHED:
            raise StoreFull(f"{unfinished} batches have not ended, which is the limit; wait for one, or cancel it.")
        with storing(self._folder, "try again"):
            while len(self._records) >= MAX_BATCHES:
                self._forget(next(each for each in self._records.values() if not each.is_unfinished))
            write(self._folder, record)
        self._records[record.id] = record
        self._needed[source.id] = record.id
        self._wake.set()
        return record

    def cancel(self, owner: str, name: str, prefix: str = "batch_") -> BatchRecord:
        """Cancel a batch; answers that it has are kept.

        Raises
        ------
        BatchNotKept, NotCancellable, StoreError
        """
        record = self.get(owner, name, prefix)
        if record.status == "cancelling":
            return record
        if record.status not in ("validating", "in_progress"):
            raise NotCancellable(f"The batch {record.id} is {record.status} and can no longer be cancelled.")
        with storing(self._folder, "try again"):
            self._change(record, "cancelling", ends_as="cancelled")
        for task, batch in [*self._at_hand.items()]:
            if batch == record.id:
                task.cancel()
        self._wake.set()
        return self.get(owner, name, prefix)

    def forget(self, owner: str, name: str, prefix: str) -> None:
        """Delete a batch that has ended, with its files.

        Raises
        ------
        BatchNotKept, NotCancellable, StoreError
        """
        record = self.get(owner, name, prefix)
        if record.is_unfinished:
            raise NotCancellable(f"The batch {record.id} is {record.status}; cancel it before it is deleted.")
        with storing(self._folder, "try again"):
            self._forget(record)

    def _forget(self, record: BatchRecord) -> None:
        (self._folder / f"{record.id}.json").unlink(missing_ok=True)
        del self._records[record.id]

    def counts(self) -> Mapping[str, int]:
        """Batches by state, for metrics."""
        found: dict[str, int] = {}
        for record in [*self._records.values()]:
            found[record.status] = found.get(record.status, 0) + 1
        return found

    # --- the work ---------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Work until the server ends."""
        if self._folder.is_dir():
            with contextlib.suppress(EdgeRuntimeError):  # told to clients when they ask
                await self.opened()
        tidied = time.monotonic()
        while not self._stopping:
            self._wake.clear()
            try:
                await self._step()
            except (EdgeRuntimeError, OSError) as error:
                logger.warning("Batches wait a moment: %s", error)
                await asyncio.sleep(FULL_S)
            except Exception:  # without this task, batches would stand still in silence
                logger.exception("Batches wait a moment")
                await asyncio.sleep(FULL_S)
            if time.monotonic() - tidied > TIDY_S and self._held is not None:
                tidied = time.monotonic()
                await asyncio.to_thread(self.files.tidy)
            await self._pause()

    async def _pause(self) -> None:
        """Wait for something to do: a batch, a line that has ended, or that nobody waits for an answer."""
        waiting = any(record.is_unfinished for record in self._records.values())
        seconds = LOOK_S if waiting and len(self._at_hand) < AT_ONCE else IDLE_S
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)

    async def _step(self) -> None:
        """Move every batch on that can be moved on, and start lines while there are places."""
        unfinished = [record for record in [*self._records.values()] if record.is_unfinished]
        for record in unfinished:
            if record.expires_at <= time.time() and record.status in ("validating", "in_progress"):
                self._change(record, "finalizing", ends_as="expired")
                self._withdraw_from(record.id)
        for record in [*self._records.values()]:
            if record.status in ("cancelling", "finalizing") and record.id not in self._at_hand.values():
                await self._finish(record)
        for record in [record for record in [*self._records.values()] if record.is_unfinished][:OPEN_BATCHES]:
            if record.status == "validating":
                await self._validate(record)
            elif record.status == "in_progress" and record.id not in self._works:
                await self._open_work(record)
        if not self._is_asked():
            await self._start_lines()

    def _withdraw_from(self, batch: str) -> None:
        for task, name in [*self._at_hand.items()]:
            if name == batch:
                task.cancel()

    def _change(self, record: BatchRecord, status: str, **more: Any) -> BatchRecord:
        """Bring a batch into another state, on disk first."""
        now = int(time.time())
        times = {**record.times, f"{status}_at": now}
        changed = replace(record, status=status, times=times, **more)
        write(self._folder, changed)
        self._records[record.id] = changed
        if not changed.is_unfinished:
            self._needed.pop(record.input_file_id, None)
        return changed

    async def _validate(self, record: BatchRecord) -> None:
        """Check every line of the input."""
        try:
            source = self.files.path(self._source(record))
            found = await asyncio.to_thread(
                check_file, source, self._settings, record.endpoint, on_line=_Breather(lambda: self._stopping)
            )
            errors = [error.as_error() for error in found.errors]
            total, model = found.total, found.model
            if not errors:
                await asyncio.to_thread(self._knows, model)
        except OSError as error:
            errors, total, model = [_error("invalid_input_file", error.strerror or "unreadable")], 0, None
        except ShuttingDown:
            return  # checked again after the next start
        except EdgeRuntimeError as error:  # the file is gone, or there is no such model
            problem = problem_of(error)
            errors, total, model = [_error(problem.code or "invalid_input_file", problem.message)], 0, None
        if self._records[record.id].status != "validating":
            return  # cancelled meanwhile
        if errors:
            self._change(record, "failed", errors=tuple(errors))
        else:
            self._change(record, "in_progress", total=total, model=model)

    def _source(self, record: BatchRecord) -> FileRecord:
        return self.files.get(record.owner, record.input_file_id)

    async def _open_work(self, record: BatchRecord) -> None:
        try:
            source = self.files.path(self._source(record))
            work = Work(self._folder, record.id, source, self._settings)
            await asyncio.to_thread(work.open)
        except (FileNotKept, OSError) as error:
            reason = str(error) if isinstance(error, FileNotKept) else error.strerror or "unreadable"
            self._change(record, "finalizing", ends_as="failed", errors=(_error("invalid_input_file", reason),))
            return
        if self._records[record.id].status != "in_progress":
            work.close()
            return
        self._works[record.id] = work

    async def _start_lines(self) -> None:
        """Take lines from the open batches in turn until all places are taken."""
        works = [(name, work) for name, work in self._works.items() if self._records[name].status == "in_progress"]
        while works and len(self._at_hand) < AT_ONCE and not self._stopping:
            name, work = works.pop(0)
            record = self._records[name]
            try:
                line = await asyncio.to_thread(work.take)  # after a restart, many done ones are skipped
            except (LineRefused, OSError) as error:
                errors = (_error("invalid_input_file", f"The input has changed: {error}"),)
                self._withdraw_from(name)
                self._change(record, "finalizing", ends_as="failed", errors=errors)
                continue
            if line is not None and (self._stopping or self._records[name].status != "in_progress"):
                work.give_back(line)  # cancelled meanwhile
            elif line is not None:
                task = asyncio.create_task(self._answer(record, work, line))
                self._at_hand[task] = name
                task.add_done_callback(partial(self._left, work, line))
                works.append((name, work))
            elif work.is_done:
                self._change(record, "finalizing", ends_as="completed")
                self._wake.set()

    def _left(self, work: Work, line: Line, task: asyncio.Task[None]) -> None:
        """Return a line that has no answer: its task was cancelled, perhaps before it began."""
        self._at_hand.pop(task, None)
        if line.custom_id in work.at_hand:
            work.give_back(line)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("A line of a batch failed unexpectedly", exc_info=error)
        self._wake.set()

    async def _answer(self, record: BatchRecord, work: Work, line: Line) -> None:
        """Answer a line, and write that down."""
        reply = await self._tried(record, line)
        try:
            data = await asyncio.to_thread(lines.output_line, line.custom_id, reply)
        except ValueError:
            logger.exception("A reply to a line of a batch is not JSON")
            data = lines.error_line(line.custom_id, "internal_error", "The reply cannot be written as JSON.")
            reply = replace(reply, status=500)
        await self._written(work, line, data, is_answer=reply.status == 200)

    async def _tried(self, record: BatchRecord, line: Line) -> lines.Reply:
        """The reply to a line; what may pass is tried again."""
        background = Background(record.owner)
        for seconds in RETRY_S:
            reply = await lines.answer(self._app, line, self._settings, background)
            if reply.status not in RETRIED:
                return reply
            await asyncio.sleep(seconds)
        return await lines.answer(self._app, line, self._settings, background)

    async def _written(self, work: Work, line: Line, data: bytes, *, is_answer: bool) -> None:
        """Append an answer; while the disk is full, it is kept in memory."""
        while True:
            try:
                work.put(line, data, is_answer=is_answer)
            except OSError as error:
                logger.warning(
                    "An answer of a batch cannot be written, it is tried again: %s", os.strerror(error.errno or 0)
                )
            else:
                self.n_answered[is_answer] += 1
                return
            await asyncio.sleep(FULL_S)

    # --- the end ----------------------------------------------------------------------------------------------

    async def _finish(self, record: BatchRecord) -> None:
        """Make files of the answers, and end a batch; what a kill interrupts is done again."""
        if record.output_file_id is None:  # otherwise all lines are written, and the files may have been moved
            has_rest = record.ends_as in ("expired", "cancelled")
            if record.id not in self._works and record.total:
                await self._open_for_the_end(record)
            work = self._works.get(record.id)
            if work is not None:
                if has_rest:
                    await asyncio.to_thread(_put_rest, work, record)
                record = _with_counts(record, work)
            output, errors = new_id("file-"), new_id("file-")
            record = self._change(record, record.status, output_file_id=output, error_file_id=errors)
            if work is not None:
                work.close()
                del self._works[record.id]
        found = [
            await asyncio.to_thread(self._as_file, record, kind, name)
            for kind, name in ((OUTPUT, record.output_file_id), (ERRORS, record.error_file_id))
        ]
        self._change(record, record.ends_as, output_file_id=found[0], error_file_id=found[1])

    async def _open_for_the_end(self, record: BatchRecord) -> None:
        """Open a batch that came to its end before it was opened since the start of the server."""
        with contextlib.suppress(FileNotKept, OSError):
            work = Work(self._folder, record.id, self.files.path(self._source(record)), self._settings)
            await asyncio.to_thread(work.open)
            self._works[record.id] = work

    def _as_file(self, record: BatchRecord, kind: str, name: str | None) -> str | None:
        """Move the lines of a batch among the files; returns the id, None if there are no lines."""
        assert name is not None
        path = self._folder / f"{record.id}{kind}"
        seconds = record.output_seconds
        created = now_ns()
        expires_at = None if seconds is None else created // 10**9 + seconds
        shown = f"{record.id}_{kind[1:]}.jsonl"
        made = FileRecord(name, record.owner, shown, "batch_output", 0, created, expires_at)
        target = self.files.path(made)
        if path.exists() and not path.stat().st_size:
            path.unlink()  # nothing fitted on the disk
        if path.exists() and not target.exists():
            Appended(path).finish()
            path.replace(target)
        if not target.exists():
            return None
        self.files.put(replace(made, n_bytes=target.stat().st_size))
        return name


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


def _with_counts(record: BatchRecord, work: Work) -> BatchRecord:
    return replace(record, completed=work.completed, failed=work.failed, unanswered=work.unanswered)


def _put_rest(work: Work, record: BatchRecord) -> None:
    """Write an error for every line that gets no answer any more."""
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


def _error(code: str, message: str) -> dict[str, Any]:
    return {"code": code, "message": message, "param": None, "line": None}
