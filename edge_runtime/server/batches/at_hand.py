"""Lines that are at hand: answered at the same time by the application in this process, as requests that give way.

A line is at hand until its answer is on disk; one that is withdrawn goes back, and is answered later.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from starlette.types import ASGIApp

from edge_runtime.server.batches import lines
from edge_runtime.server.batches.lines import Line
from edge_runtime.server.batches.records import BatchRecord
from edge_runtime.server.batches.work import Work
from edge_runtime.server.middleware.shares import Background
from edge_runtime.server.settings import Settings

logger = logging.getLogger("edge_runtime.server")

AT_ONCE = 4
"""Lines that are answered at the same time: half the sequences of a model."""
RETRIED = frozenset({429, 503, 507})
"""Statuses that may pass: no memory, no room on the disk."""
RETRY_S = (1.0, 5.0, 15.0, 30.0, 60.0)
"""Pauses before a line is tried again; after the last one its error is its answer."""
FULL_S = 10.0
"""Pause before an answer is written again to a full disk."""


class AtHand:
    """The lines that are being answered.

    Parameters
    ----------
    app : answers the lines.
    on_left : called in the event loop when a line is no longer at hand.
    """

    def __init__(self, app: ASGIApp, settings: Settings, on_left: Callable[[], None]) -> None:
        self._app, self._settings, self._on_left = app, settings, on_left
        self._tasks: dict[asyncio.Task[None], str] = {}
        """With their batches."""
        self.n_answered = {True: 0, False: 0}
        """Lines since the start: with answers, and without."""

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def has_room(self) -> bool:
        """Whether another line may be begun."""
        return len(self._tasks) < AT_ONCE

    def has_any_of(self, batch: str) -> bool:
        """Whether lines of this batch are being answered."""
        return batch in self._tasks.values()

    def begin(self, record: BatchRecord, work: Work, line: Line) -> None:
        """Have a line answered that was taken from this work."""
        task = asyncio.create_task(self._answer(record, work, line))
        self._tasks[task] = record.id
        task.add_done_callback(partial(self._left, work, line))

    def withdraw(self, batch: str | None = None) -> None:
        """Return the lines of a batch, or all; they leave soon."""
        for task, name in [*self._tasks.items()]:
            if batch in (None, name):
                task.cancel()

    async def all_left(self) -> None:
        """Wait until no line is being answered."""
        if self._tasks:
            await asyncio.wait([*self._tasks])

    def _left(self, work: Work, line: Line, task: asyncio.Task[None]) -> None:
        """Return a line that has no answer: its task was cancelled, perhaps before it began."""
        self._tasks.pop(task, None)
        if line.custom_id in work.at_hand:
            work.give_back(line)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("A line of a batch failed unexpectedly", exc_info=error)
        self._on_left()

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
