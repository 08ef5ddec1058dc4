"""All batches of a server: created, worked through while nobody waits for an answer, cancelled, kept across restarts.

One task of the event loop takes lines from the batches in turn, oldest batch first, and has a few of them answered at
the same time (`at_hand`). When the server ends, or a person's request needs the memory of the model, these go back.

One process at a time works in the folder (`kept`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from starlette.types import ASGIApp

from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.server.batches.at_hand import FULL_S, AtHand
from edge_runtime.server.batches.beginning import input_error, open_work, validate
from edge_runtime.server.batches.ending import finish
from edge_runtime.server.batches.kept import Kept, NotCancellable
from edge_runtime.server.batches.lines import LineRefused
from edge_runtime.server.batches.records import BatchRecord
from edge_runtime.server.settings import Settings
from edge_runtime.store.download import storing

logger = logging.getLogger("edge_runtime.server")

OPEN_BATCHES = 4
"""Batches whose lines are taken in turn; later ones wait."""
LOOK_S = 0.05
"""Pause between looks whether somebody waits for an answer."""
IDLE_S = 1.0
"""Pause between looks for batches whose time is over."""
TIDY_S = 60.0


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
        self._settings, self._is_asked, self._knows = settings, is_asked, knows
        self._kept = Kept(root, settings)
        self.files = self._kept.files
        self._wake = asyncio.Event()
        self._at_hand = AtHand(app, settings, self._wake.set)
        self.n_answered = self._at_hand.n_answered
        """Lines since the start: with answers, and without."""
        self._running: asyncio.Task[None] | None = None
        self._stopping = False

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
        if not self._kept.is_open:
            await asyncio.to_thread(self._kept.open)
            self._wake.set()
        return self

    def stop(self) -> None:
        """Return what is at hand: the server is ending."""
        self._stopping = True
        self.withdraw()

    def withdraw(self) -> None:
        """Return what is at hand; it is answered later."""
        self._at_hand.withdraw()

    async def close(self) -> None:
        """End the work, and let others have the folder."""
        self.stop()
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        await self._at_hand.all_left()
        self._kept.close()

    # --- what clients do --------------------------------------------------------------------------------------

    def get(self, owner: str, name: str, prefix: str = "batch_") -> BatchRecord:
        """A batch of this owner, with the numbers of this moment.

        Raises
        ------
        BatchNotKept
        """
        return self._kept.get(owner, name, prefix)

    def all(self, owner: str, prefix: str = "batch_") -> list[BatchRecord]:
        """Batches of this owner, oldest first."""
        return self._kept.all(owner, prefix)

    def create(self, record: BatchRecord) -> BatchRecord:
        """Start a batch; its input is checked soon.

        Raises
        ------
        FileNotKept, RequestError, StoreFull, StoreError
        """
        self._kept.create(record)
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
        with storing(self._kept.folder, "try again"):
            self._kept.change(record, "cancelling", ends_as="cancelled")
        self._at_hand.withdraw(record.id)
        self._wake.set()
        return self.get(owner, name, prefix)

    def forget(self, owner: str, name: str, prefix: str) -> None:
        """Delete a batch that has ended, with its files.

        Raises
        ------
        BatchNotKept, NotCancellable, StoreError
        """
        self._kept.forget(owner, name, prefix)

    def counts(self) -> Mapping[str, int]:
        """Batches by state, for metrics."""
        return self._kept.counts()

    # --- the work ---------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Work until the server ends."""
        if self._kept.folder.is_dir():
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
            if time.monotonic() - tidied > TIDY_S and self._kept.is_open:
                tidied = time.monotonic()
                await asyncio.to_thread(self.files.tidy)
            await self._pause()

    async def _pause(self) -> None:
        """Wait for something to do: a batch, a line that has ended, or that nobody waits for an answer."""
        waiting = bool(self._kept.unfinished())
        seconds = LOOK_S if waiting and self._at_hand.has_room else IDLE_S
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)

    async def _step(self) -> None:
        """Move every batch on that can be moved on, and start lines while there are places."""
        for record in self._kept.unfinished():
            if record.expires_at <= time.time():
                await self._expire(record)
        for record in [*self._kept.records.values()]:
            if record.status in ("cancelling", "finalizing") and not self._at_hand.has_any_of(record.id):
                await finish(self._kept, record)
        for record in self._kept.unfinished()[:OPEN_BATCHES]:
            if record.status == "validating":
                await self._validate(record)
            elif record.status == "in_progress" and record.id not in self._kept.works:
                await open_work(self._kept, record)
        if not self._is_asked():
            await self._start_lines()

    async def _validate(self, record: BatchRecord) -> None:
        await validate(self._kept, record, self._settings, self._knows, lambda: self._stopping)

    async def _expire(self, record: BatchRecord) -> None:
        """End a batch whose time is over; its lines are known first, so that each gets an error."""
        if record.status == "validating":
            await self._validate(record)
            record = self._kept.records[record.id]
        if record.status == "in_progress":
            self._kept.change(record, "finalizing", ends_as="expired")
            self._at_hand.withdraw(record.id)

    async def _start_lines(self) -> None:
        """Take lines from the open batches in turn until all places are taken."""
        works = [
            (name, work)
            for name, work in self._kept.works.items()
            if self._kept.records[name].status == "in_progress"
        ]
        while works and self._at_hand.has_room and not self._stopping:
            name, work = works.pop(0)
            record = self._kept.records[name]
            try:
                line = await asyncio.to_thread(work.take)  # after a restart, many done ones are skipped
            except (LineRefused, OSError) as error:
                errors = (input_error(f"The input has changed: {error}"),)
                self._at_hand.withdraw(name)
                self._kept.change(record, "finalizing", ends_as="failed", errors=errors)
                continue
            if line is not None and (self._stopping or self._kept.records[name].status != "in_progress"):
                work.give_back(line)  # cancelled meanwhile
            elif line is not None:
                self._at_hand.begin(record, work, line)
                works.append((name, work))
            elif work.is_done:
                self._kept.change(record, "finalizing", ends_as="completed")
                self._wake.set()
