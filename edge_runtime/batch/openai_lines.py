"""Lines of OpenAI's batches → items, and the server's application in this process → their answers, in OpenAI's form.

Needs the extra [serve]. No socket is opened, and batches of a server on this machine are left alone.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.batch.files import digest
from edge_runtime.batch.items import Item
from edge_runtime.batch.jobs import raw_lines
from edge_runtime.batch.lines import Recorded
from edge_runtime.errors import EdgeRuntimeError, MessageError
from edge_runtime.server.app import create_app
from edge_runtime.server.batches.lines import ENDPOINTS, Line, LineRefused, Reply, answer, output_line, parse
from edge_runtime.server.middleware.shares import Background
from edge_runtime.server.settings import Settings
from edge_runtime.server.state import server_of

RETRIED = frozenset({429, 503, 507})
"""Statuses that may pass."""
RETRY_S = (1.0, 5.0, 15.0)
OK = 200


@dataclass(frozen=True)
class Replied:
    """What the application answered."""

    reply: Reply

    @property
    def is_answer(self) -> bool:
        """Whether it is no error."""
        return self.reply.status == OK


class OpenAIJobs:
    """Items of a file of OpenAI's lines, every one of which has been checked.

    Raises
    ------
    MessageError
        Names the line, what was found and what was expected.
    """

    is_final = True

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path, self._settings = path, settings
        self.total = 0
        self.models: dict[str, int] = {}
        """Models that lines name, with the first line of each."""
        seen: dict[bytes, int] = {}
        for line in self._lines():
            self.total += 1
            if line.model is not None:
                self.models.setdefault(line.model, line.number)
            if (first := seen.setdefault(digest(line.custom_id), line.number)) != line.number:
                raise MessageError(
                    f"Line {line.number} of {path} has the custom_id {line.custom_id[:80]!r}, as line {first}; "
                    "expected one of its own."
                )

    def _lines(self) -> Iterator[Line]:
        for number, data in raw_lines(self._path):
            try:
                yield parse(data, number, self._settings, ENDPOINTS)
            except LineRefused as error:
                raise MessageError(f"{self._path}: {error}") from None

    def __iter__(self) -> Iterator[Item]:
        """Read the file once more; the message of an item is its line."""
        for line in self._lines():
            yield Item(line.custom_id, {}, [line])


class Application:
    """The server's application, in an event loop of its own thread; answers items from any thread.

    Parameters
    ----------
    settings : name the model, which is loaded when this is entered.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._app = create_app(settings)
        self._state = server_of(self._app)
        self._cancelled = threading.Event()

    def check_models(self, jobs: OpenAIJobs) -> None:
        """Refuse a file that asks a model which is not here.

        Raises
        ------
        MessageError
        """
        for model, number in jobs.models.items():
            try:
                self._state.catalog.find(model)
            except EdgeRuntimeError as error:
                raise MessageError(
                    f"Line {number}: {error} A line without a model is answered by the one that -m names."
                ) from None

    def __enter__(self) -> Application:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="edge-runtime requests", daemon=True)
        self._thread.start()
        try:
            self._run(self._state.registry.preload())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def __call__(self, item: Item) -> Replied:
        """Answer a line; statuses that may pass are tried again."""
        line: Line = item.messages[0]  # type: ignore[assignment] # of OpenAIJobs
        reply = Reply(503, b"{}")
        for seconds in (*RETRY_S, None):
            reply = self._run(answer(self._app, line, self._settings, Background()))
            if reply.status not in RETRIED or seconds is None or self._cancelled.wait(seconds):
                break
        return Replied(reply)

    def cancel(self) -> None:
        """Wait for nothing more."""
        self._cancelled.set()

    def close(self) -> None:
        """End what is at work and unload the models."""

        async def end() -> None:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            self._state.inference.close()
            self._state.making.shutdown(wait=False, cancel_futures=True)
            await self._state.registry.close()

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def line_of(item: Item, found: Replied) -> bytes:
    """The line of an answer, or of an error with which the application replied."""
    return output_line(item.id, found.reply)


def read_line(data: bytes) -> Recorded | None:
    """What a line of `line_of` records."""
    try:
        value = json.loads(data)
        response = value["response"]
        is_error = response is None or response["status_code"] != OK
        found = Recorded(value["custom_id"], "", is_error)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return found if isinstance(found.id, str) else None
