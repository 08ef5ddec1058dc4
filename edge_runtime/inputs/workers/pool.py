"""Worker processes that decode untrusted files: how many, for how long, and who waits for whom.

A file may take long, or for ever, whatever its size. So there are two lanes. A lease starts in the fast one; when one
of its requests takes longer than `SLOW_AFTER_S`, it moves to the slow one, where one file is processed at a time, in
turns and at a lower priority, while the others are paused. So slow files delay each other, but hardly any file that
decodes in the usual time. Frames of videos are decoded in workers of their own, which are held as long as a video is
encoded.

A worker is ended when one of its requests takes too long, when nobody waits for it any more, and when it has become
large; another one replaces it.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from edge_runtime import errors
from edge_runtime.errors import EdgeRuntimeError, EngineBusy, ImageError
from edge_runtime.inputs.workers.lanes import Check, Lane
from edge_runtime.inputs.workers.worker import Worker, WorkerEnded
from edge_runtime.system.memory import available_bytes

TIMEOUT_S = 30.0
"""Default for one page, picture or frame: in CPU time where the system reports it, since machines are busy."""
MAX_WAIT = 4
"""It may take this many times as long in wall-clock time."""
SLOW_AFTER_S = 0.3
"""Measured like `TIMEOUT_S`; most files take less: 12 million pixels of JPEG are decoded and cut in 0.4 s."""
TURN_S = 0.5
"""Turn of a file in the slow lane, while others wait there."""
N_SLOW = 1
"""Slow files that are processed at once."""
MAX_SLOW = 16
"""Slow files that are processed or paused, each with its memory."""
N_VIDEOS = 2
MIN_BYTES, BYTES_PER_PIXEL = 1 << 30, 32
"""Memory of a worker: libraries and an encoded file, and a picture in 16 bits with alpha, several times."""
RETIRED_AFTER = 1000
"""Requests after which a worker is replaced, so that leaks of decoders are bounded."""
LARGE_BYTES = 64 << 20
"""Size of one file or its pixels after which a worker is replaced, since memory is rarely given back."""


class DecoderPool:
    """Worker processes, started when needed.

    Parameters
    ----------
    n_workers : files in the fast lane at once.
    timeout_s : limit in seconds for one picture, page or frame, see `TIMEOUT_S`; pauses do not count.
    pixel_limit : maximum number of pixels of a picture; decides how much memory a worker may take.
    """

    def __init__(self, n_workers: int = 2, timeout_s: float = TIMEOUT_S, pixel_limit: int = 64_000_000) -> None:
        self.timeout_s = timeout_s
        self.max_bytes = MIN_BYTES + BYTES_PER_PIXEL * pixel_limit
        self.max_bytes = max(MIN_BYTES, min(self.max_bytes, available_bytes() // 2))
        self._changed = threading.Condition()
        self.fast = Lane(n_workers, self._changed)
        self.slow = Lane(N_SLOW, self._changed)
        self.videos = Lane(N_VIDEOS, self._changed)
        self.n_slow = 0
        """Leases in the slow lane, waiting ones included."""
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._n_kept = n_workers
        self._is_started = self._is_closed = False
        _end_at_exit(self)

    def start(self) -> None:
        """Keep a worker ready for the next picture, also after one was ended; returns at once."""
        self._is_started = True

        def begin() -> None:
            with contextlib.suppress(EdgeRuntimeError):
                self._put(self._worker())

        threading.Thread(target=begin, name="edge-runtime decoding", daemon=True).start()

    @contextmanager
    def lease(self, check: Check = lambda: None, *, for_frames: bool = False, owner: str = "") -> Iterator[Lease]:
        """A worker for a while, for one thread.

        Parameters
        ----------
        for_frames : whether it is held while frames are encoded.
        owner : the client that sent the file.

        Raises
        ------
        BackendUnavailable
            When none can be started.
        """
        lane = self.videos if for_frames else self.fast
        lease = Lease(self, lane, check, owner)
        lease.since = lane.take(owner, check)
        try:
            lease.worker = self._worker()
            yield lease
        finally:
            lease.end()

    def _worker(self) -> Worker:
        """An idle worker, or a new one."""
        while True:
            with self._changed:
                if self._is_closed:
                    raise errors.RequestCancelled("The server is shutting down; try again later.")
                worker = self._idle.pop() if self._idle else None
                if worker is not None:
                    self._busy.add(worker)
            if worker is None:
                worker = Worker(self.max_bytes)
                with self._changed:
                    self._busy.add(worker)
                    if not self._is_closed:
                        return worker
            elif worker.is_alive:
                return worker
            self._forget(worker)

    def _put(self, worker: Worker) -> None:
        """Take a worker back, if others can use it."""
        with self._changed:
            is_wanted = not self._is_closed and len(self._idle) < self._n_kept
            if is_wanted and worker.is_alive:
                self._busy.discard(worker)
                self._idle.append(worker)
                return
        self._forget(worker)

    def _forget(self, worker: Worker) -> None:
        with self._changed:
            self._busy.discard(worker)
            is_missed = self._is_started and not self._is_closed and len(self._idle) < self._n_kept
        worker.end()
        if is_missed:
            self.start()

    def close(self) -> None:
        """End all workers; requests that wait for one get an error."""
        with self._changed:
            self._is_closed = True
            idle, self._idle = self._idle, []
            for worker in self._busy:
                worker.kill()  # its user ends it
            self._changed.notify_all()
        for worker in idle:
            worker.end()

    @property
    def pids(self) -> list[int]:
        """Ids of the processes."""
        with self._changed:
            return [worker.pid for worker in (*self._idle, *self._busy)]


@dataclass(frozen=True)
class ClientsDecoders:
    """The pool, as one client of a server sees it."""

    pool: DecoderPool
    owner: str

    def lease(self, check: Check = lambda: None, *, for_frames: bool = False) -> AbstractContextManager[Lease]:
        """As `DecoderPool.lease`."""
        return self.pool.lease(check, for_frames=for_frames, owner=self.owner)


Decoders = DecoderPool | ClientsDecoders


class Lease:
    """A worker leased to one request. Made by `DecoderPool.lease`."""

    worker: Worker

    def __init__(self, pool: DecoderPool, lane: Lane, check: Check, owner: str) -> None:
        self.pool, self.check, self._owner = pool, check, owner
        self._lane: Lane | None = lane
        self.since = 0.0
        """Time at which its place was given."""
        self._is_slow = self._is_large = False

    def ask(
        self,
        request: Mapping[str, Any],
        name: str,
        *,
        data: bytes | memoryview | None = None,
        what: str = "",
        n_threads: int = 1,
        on_share: Callable[[float], None] = lambda share: None,
        error: type[ImageError] = ImageError,
    ) -> dict[str, Any]:
        """Send a request, with or without a file, and return its reply.

        Parameters
        ----------
        name : of the file, for errors.
        what : the part of the file that is decoded, for errors: `Page 3 of `.
        n_threads : threads that the decoder may use.
        error : class of the error when the worker fails.

        Raises
        ------
        EdgeRuntimeError
            What the worker raised; `error` when it takes too long, or the process ends.
        """
        whole = f"{what}{name}"
        if data is not None:
            self._send(data)
            request = {**request, "bytes": len(data)}
        try:
            reply = self.worker.ask(request, _Watch(self, whole, error, n_threads), 8 * self.pool.timeout_s, on_share)
        except WorkerEnded:
            if self.pool._is_closed:
                raise errors.RequestCancelled("The server is shutting down; try again later.") from None
            raise error(
                f"{whole} ended the process that decodes it, which may take {self.pool.max_bytes >> 20} MB of "
                "memory; it is damaged, or too large: save it again, or smaller."
            ) from None
        if "error" in reply:
            raise _error(reply, whole, error)
        return reply

    def pixels(self, n_bytes: int, name: str) -> bytes:
        """Pixels that the last request produced."""
        self._is_large = self._is_large or n_bytes > LARGE_BYTES
        buffer = self.worker.buffer
        if n_bytes > buffer.n_bytes:
            buffer.resize(n_bytes)
            self.ask({"op": "fetch"}, name)
        return buffer.memory[:n_bytes]

    def _send(self, data: bytes | memoryview) -> None:
        self._is_large = self._is_large or len(data) > LARGE_BYTES
        self.worker.buffer.resize(len(data))
        self.worker.buffer.memory[: len(data)] = data

    def become_slow(self, what: str) -> float:
        """Leave the fast lane; returns the seconds that the worker was paused."""
        if self._is_slow:
            return 0.0
        self._is_slow = True
        self.worker.be_less_urgent()
        pool = self.pool
        if self._lane is not pool.fast:
            return 0.0
        self._leave()
        with pool._changed:
            if pool.n_slow >= MAX_SLOW:
                raise EngineBusy(
                    f"{what} takes long to decode, and so do {pool.n_slow} other files at the moment; try again "
                    "later."
                )
            pool.n_slow += 1
        if pool.slow.take_now():
            self._lane, self.since = pool.slow, time.monotonic()
            return 0.0
        return self._wait_for_a_turn()

    def take_turns(self) -> float:
        """Let another slow file continue, if one waits; returns the seconds that the worker was paused."""
        slow = self.pool.slow
        if self._lane is not slow or not slow.waiting or time.monotonic() - self.since < TURN_S:
            return 0.0
        self._lane = None
        slow.give_back(self._owner, self.since)
        return self._wait_for_a_turn()

    def _wait_for_a_turn(self) -> float:
        pool, began = self.pool, time.monotonic()
        self.worker.pause()
        try:
            self.since = pool.slow.take(self._owner, self.check)
        except BaseException:
            with pool._changed:
                pool.n_slow -= 1
            raise
        self._lane = pool.slow
        self.worker.resume()
        return self.since - began

    def _leave(self) -> None:
        lane, self._lane = self._lane, None
        if lane is not None:
            lane.give_back(self._owner, self.since)
        if lane is self.pool.slow:
            with self.pool._changed:
                self.pool.n_slow -= 1

    def end(self) -> None:
        """Give the worker back, or end it."""
        worker: Worker | None = getattr(self, "worker", None)
        if worker is not None:
            if worker.is_less_urgent or self._is_large or worker.n_requests > RETIRED_AFTER or not worker.is_alive:
                self.pool._forget(worker)
            else:
                self._clear(worker)
        self._leave()

    def _clear(self, worker: Worker) -> None:
        try:
            worker.clear()
        except OSError:
            self.pool._forget(worker)
        else:
            self.pool._put(worker)


class _Watch:
    """Enforces limits while a request is processed."""

    def __init__(self, lease: Lease, what: str, error: type[ImageError], n_threads: int) -> None:
        self._lease, self._what, self._error, self._n_threads = lease, what, error, n_threads
        self._is_slow, self._paused_s = False, 0.0
        self._before_s = lease.worker.processor_s

    def __call__(self, seconds: float) -> None:
        lease = self._lease
        lease.check()
        if not self._is_slow and self._is_over(seconds, SLOW_AFTER_S):
            self._is_slow = True
            self._paused_s = lease.become_slow(self._what)
        self._paused_s += lease.take_turns()
        if self._is_over(seconds - self._paused_s, lease.pool.timeout_s):
            raise self._error(
                f"{self._what} takes longer than {lease.pool.timeout_s:g} s to decode, which is the limit; save it "
                "in a simpler form, leave it out, or raise the limit with --decode-timeout."
            )

    def _is_over(self, seconds: float, limit: float) -> bool:
        if seconds < limit:
            return False
        now = self._lease.worker.processor_s
        if now is None or self._before_s is None:
            return seconds > limit
        return now - self._before_s > limit * self._n_threads or seconds > MAX_WAIT * limit


def _error(reply: Mapping[str, Any], what: str, otherwise: type[ImageError]) -> EdgeRuntimeError:
    """The error that a worker reports; unknown kinds come from a file that its decoder could not handle."""
    name, text = str(reply["error"]), " ".join(str(reply.get("text")).split())
    found = getattr(errors, name, None)
    if isinstance(found, type) and issubclass(found, EdgeRuntimeError):
        return found(str(reply.get("text")))
    if name == "MemoryError":
        return otherwise(
            f"{what} needs more memory to be decoded than is allowed; it is damaged, or too large: scale it down."
        )
    return otherwise(f"{what} cannot be decoded ({text[:200]}); it is damaged: get the file again.")


def _end_at_exit(pool: DecoderPool) -> None:
    held = weakref.ref(pool)

    def end() -> None:
        found = held()
        if found is not None:
            found.close()

    atexit.register(end)
