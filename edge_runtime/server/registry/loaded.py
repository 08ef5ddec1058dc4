"""Loaded models: loaded on demand, kept for a while, unloaded when memory is needed.

A model is pinned while a request uses it. Loading happens in a thread, one model at a time; requests for the same
model wait for it. The least recently used model is unloaded first when another one needs the memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime.errors import EdgeRuntimeError, NotEnoughMemoryError
from edge_runtime.loading.load import LoadOptions, needed_bytes
from edge_runtime.model import Model
from edge_runtime.server.errors import ShuttingDown
from edge_runtime.server.middleware.shares import in_background
from edge_runtime.server.registry.catalog import Catalog, Listed
from edge_runtime.server.settings import Settings
from edge_runtime.system.memory import available_bytes

logger = logging.getLogger("edge_runtime.server")

FOREVER = -1.0
LEAVE_S, LEAVE_PAUSE_S = 30.0, 0.02
"""How long a model is waited for that is left, and how often it is looked at."""


@dataclass(eq=False)
class Slot:
    """One model, loaded or loading."""

    listed: Listed
    """Under the name last used for it."""
    keep_alive_s: float
    """After the last use; below 0: forever."""
    users: int = 0
    n_background: int = 0
    """Of these, requests that give way."""
    n_bytes: int = 0
    model: Model | None = None
    loading: asyncio.Task[None] | None = None
    last_used: float = field(default_factory=time.monotonic)
    ends_at: float | None = None
    """By `time.monotonic`, since the system clock may be changed; None while it is used, or if it stays."""
    timer: asyncio.TimerHandle | None = None

    @property
    def expires_at(self) -> float | None:
        """Unix time at which it is unloaded, by the current clock; None as above."""
        return None if self.ends_at is None else time.time() + self.ends_at - time.monotonic()


@dataclass(frozen=True)
class Use:
    """A pinned model."""

    listed: Listed
    model: Model
    load_s: float
    """How long this request waited for it."""


class ModelRegistry:
    """The models in memory. All methods belong to the event loop's thread."""

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        self._settings, self.catalog = settings, catalog
        self._slots: dict[tuple[Path, ...], Slot] = {}
        self._one_at_a_time = asyncio.Lock()
        self._resident: set[tuple[Path, ...]] = set()
        """Files of the models that the owner wants loaded."""
        self._leaving: set[asyncio.Future[None]] = set()
        self._closing = False
        self.withdraw: Callable[[], None] = lambda: None
        """Called when a model is needed in place of one that only requests that give way use."""

    @contextlib.asynccontextmanager
    async def use(self, name: str | None, keep_alive_s: float | None = None) -> AsyncIterator[Use]:
        """Pin a model, loading it if needed.

        Parameters
        ----------
        name : as clients give it; None takes the default model.
        keep_alive_s : how long it stays after this; None is the owner's default, and forever for the owner's models.

        Raises
        ------
        ModelNotFound, ModelFileError, NotEnoughMemoryError
            When there is no such model, or it cannot be loaded.
        """
        started = time.perf_counter()
        if self._closing:
            raise ShuttingDown("The server is shutting down; try again later.")
        listed = await asyncio.to_thread(self.catalog.find, name)
        if self._closing:  # meanwhile: what is loaded now would never be unloaded
            raise ShuttingDown("The server is shutting down; try again later.")
        await self._leave_changed(listed)
        slot = self._slots.setdefault(listed.files, Slot(listed, self._settings.keep_alive_s))
        slot.listed = listed
        in_back = in_background() is not None
        slot.users += 1
        slot.n_background += in_back
        self._stop_timer(slot)
        try:
            if slot.loading is None:
                slot.loading = asyncio.create_task(self._load(slot))
            await asyncio.shield(slot.loading)  # a client that hangs up does not cancel loading for the others
            usual = FOREVER if listed.files in self._resident else self._settings.keep_alive_s
            slot.keep_alive_s = usual if keep_alive_s is None else keep_alive_s
            assert slot.model is not None
            waited = time.perf_counter() - started
            yield Use(listed, slot.model, waited)
        finally:
            slot.users -= 1
            slot.n_background -= in_back
            slot.last_used = time.monotonic()
            self._start_timer(slot)

    def loaded(self) -> list[Slot]:
        """Models in memory, the most recently used first."""
        found = [slot for slot in self._slots.values() if slot.model is not None]
        return sorted(found, key=lambda slot: (slot.users > 0, slot.last_used), reverse=True)

    async def preload(self) -> None:
        """Load the owner's models at startup; they stay, unless a request says otherwise or memory is needed."""
        for name in self._settings.models:
            listed = self.catalog.owned(name)
            self._resident.add(listed.files)
            async with self.use(listed.name):
                logger.info("%s is loaded", listed.name)

    async def forget(self, listed: Listed) -> None:
        """Unload a model as soon as nobody uses it: it is being deleted, or a request unloads it."""
        slot = self._slots.get(listed.files)
        if slot is not None:
            slot.keep_alive_s = 0.0
            if slot.users == 0:
                await self._unload(slot)

    async def _leave_changed(self, listed: Listed) -> None:
        """Unload a model whose files were written to, so that it is loaded again; its users get their own errors."""
        slot = self._slots.get(listed.files)
        if slot is None or slot.model is None:
            return
        try:
            slot.model.check_usable()
        except EdgeRuntimeError as error:
            logger.warning("%s is loaded again: %s", listed.name, error)
            if slot.users == 0:
                await self._unload(slot)
            elif self._slots.get(listed.files) is slot:
                del self._slots[listed.files]
                slot.keep_alive_s = 0.0  # unloaded with its last user

    async def close(self) -> None:
        """Unload everything, and wait for models that are being unloaded."""
        self._closing = True
        if self._leaving:
            await asyncio.wait([*self._leaving])
        for slot in [*self._slots.values()]:
            if slot.loading is not None:
                await asyncio.wait([slot.loading])
            await self._unload(slot)

    async def _load(self, slot: Slot) -> None:
        # A cache folder that has become unusable since the start costs speed, never a request.
        setup = {**self._settings.load, "needs_cache": False, "warms_up": True}
        options = LoadOptions(**setup, adapters=slot.listed.adapters).checked()
        paths = slot.listed.paths
        try:
            async with self._one_at_a_time:
                slot.n_bytes = await asyncio.to_thread(needed_bytes, paths, options)
                await self._make_room(slot)
                slot.model = await self._retrying(lambda: Model(paths, options))
        except BaseException:
            self._slots.pop(slot.listed.files, None)  # the next request tries again
            raise
        slot.last_used = time.monotonic()
        self._start_timer(slot)

    async def _retrying(self, load: Callable[[], Model]) -> Model:
        """Load; while memory is short and an idle model can be unloaded, unload it and try again."""
        while True:
            try:
                return await asyncio.to_thread(load)
            except NotEnoughMemoryError:
                if not await self._evict():
                    raise

    async def _make_room(self, slot: Slot) -> None:
        limit = self._settings.max_loaded_bytes
        while slot.n_bytes > available_bytes():
            if not await self._evict():
                break  # a smaller context may still fit: loading finds out, or reports the numbers
        while limit is not None and slot.n_bytes + sum(other.n_bytes for other in self.loaded()) > limit:
            if not await self._evict():
                raise NotEnoughMemoryError(
                    f"{slot.listed.name} needs about {slot.n_bytes / 1e9:.1f} GB of memory, which with the models in "
                    f"use is more than the {limit / 1e9:.1f} GB that the owner allows; try again later."
                )

    async def _evict(self) -> bool:
        """Unload the model that has been idle for longest; False when all are in use."""
        idle = [slot for slot in self.loaded() if slot.users == 0]
        if not idle:
            idle = await self._freed()
        if not idle:
            return False
        await self._unload(idle[-1])
        return True

    async def _freed(self) -> list[Slot]:
        """Models that requests that give way have left, for one that does not."""
        held = [slot for slot in self.loaded() if slot.users == slot.n_background]
        if not held or in_background() is not None:
            return []
        ends = time.monotonic() + LEAVE_S
        while time.monotonic() < ends and not any(slot.users == 0 for slot in held):
            self.withdraw()
            await asyncio.sleep(LEAVE_PAUSE_S)
        return [slot for slot in held if slot.users == 0 and slot.model is not None]

    async def _unload(self, slot: Slot) -> None:
        await self._close(slot, self._take_out(slot))

    def _take_out(self, slot: Slot) -> Model | None:
        """Remove a model from the table in one step, so that no new user can get it."""
        self._stop_timer(slot)
        if self._slots.get(slot.listed.files) is slot:
            del self._slots[slot.listed.files]
        model, slot.model = slot.model, None
        return model

    async def _close(self, slot: Slot, model: Model | None) -> None:
        if model is not None:
            await asyncio.to_thread(model.close)
            logger.info("%s is unloaded", slot.listed.name)

    def _start_timer(self, slot: Slot) -> None:
        """Schedule the unloading of an idle model."""
        self._stop_timer(slot)
        if slot.users or slot.model is None or slot.keep_alive_s < 0 or self._closing:
            return
        slot.ends_at = time.monotonic() + slot.keep_alive_s
        loop = asyncio.get_running_loop()
        slot.timer = loop.call_later(slot.keep_alive_s, self._expire, slot)

    def _expire(self, slot: Slot) -> None:
        if slot.users:
            return
        leaving = asyncio.ensure_future(self._close(slot, self._take_out(slot)))
        self._leaving.add(leaving)  # keep a reference, or the task may be garbage-collected
        leaving.add_done_callback(self._leaving.discard)

    def _stop_timer(self, slot: Slot) -> None:
        slot.ends_at = None
        if slot.timer is not None:
            slot.timer.cancel()
            slot.timer = None
