"""One process that decodes untrusted files, seen from its parent: started, asked, paused, ended.

Knows how requests and replies are written (`process`), and nothing about pictures.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from edge_runtime.errors import BackendUnavailable
from edge_runtime.system.shared_memory import SharedBuffer

logger = logging.getLogger("edge_runtime")

START_S = 60.0
"""Time for the process to start on a busy machine."""
POLL_S = 0.05
"""How often a wait is interrupted for checks."""
MAX_REPLY_BYTES = 64 << 20
"""Enough for the times of a video of several days; a longer line is not a reply."""
CLEAR_S = 10.0
URGENCY, LESS_URGENT = 5, 10  # nice values: running answers go first, then files that do not take long

OnWait = Callable[[float], None]
"""Called regularly with the seconds that a request has taken; what it raises ends the worker."""


class WorkerEnded(Exception):  # noqa: N818 - says what happened
    """The process ended, or wrote something that is not a reply."""


class Worker:
    """A running process. Used by one thread at a time.

    Parameters
    ----------
    max_bytes : limit of its memory.

    Raises
    ------
    BackendUnavailable
        When it cannot be started.
    """

    def __init__(self, max_bytes: int) -> None:
        self.buffer = SharedBuffer()
        self.n_requests = 0
        self.is_less_urgent = False
        self._replies: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "edge_runtime.inputs.workers.process", str(max_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                pass_fds=self.buffer.inherited,
                # Ctrl-C in the terminal is for its parent only. Not a session of its own: Linux gives sessions equal
                # shares of the CPU (autogroup), whatever their nice values.
                process_group=0,
            )
        except OSError as error:
            self.buffer.close()
            raise BackendUnavailable(
                f"Pictures are decoded in a separate process, which cannot be started ({error}); check whether "
                "memory or processes have run out."
            ) from None
        self._set_nice(URGENCY)
        assert self._process.stdout is not None
        threading.Thread(
            target=_read, args=(self._process.stdout, self._replies), name="edge-runtime decoding", daemon=True
        ).start()
        try:
            self.held = self._next(_no_longer_than(START_S))
            """What the process has given up, see `sandbox`: name → whether the system can do that."""
        except (WorkerEnded, TimeoutError):
            self.end()
            raise BackendUnavailable(
                "Pictures are decoded in a separate process, which did not start; check free memory."
            ) from None

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def ask(
        self,
        request: Mapping[str, Any],
        on_wait: OnWait,
        processor_s: float,
        on_share: Callable[[float], None] = lambda share: None,
    ) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Parameters
        ----------
        on_wait : what it raises ends the process, and is raised.
        processor_s : CPU time after which the process ends by itself.

        Raises
        ------
        WorkerEnded
        """
        self.n_requests += 1
        try:
            self._send({**request, "processor_s": processor_s})
            while True:
                reply = self._next(on_wait, on_share)
                if reply.get("number") == self.n_requests:
                    return reply
        except OSError:
            self.end()
            raise WorkerEnded from None
        except BaseException:
            self.end()
            raise

    def clear(self) -> None:
        """Ask it to close everything, without waiting for it.

        Raises
        ------
        OSError
            When it has ended.
        """
        self.buffer.resize(0)
        self._send({"op": "clear", "processor_s": CLEAR_S})

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        where = {"buffer": self.buffer.address, "room": self.buffer.n_bytes, "number": self.n_requests}
        self._process.stdin.write(json.dumps({**request, **where}).encode() + b"\n")
        self._process.stdin.flush()

    def _next(self, on_wait: OnWait, on_share: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
        began = time.monotonic()
        while True:
            try:
                reply = self._replies.get(timeout=POLL_S)
            except queue.Empty:
                on_wait(time.monotonic() - began)
                continue
            if reply is None:
                raise WorkerEnded
            if "share" not in reply:
                return reply
            on_share(float(reply["share"]))
            on_wait(time.monotonic() - began)

    @property
    def processor_s(self) -> float | None:
        """CPU time that the process has used; None where the system does not report it."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError, ValueError):
            return None

    def be_less_urgent(self) -> None:
        """Let others go first from now on: what it decodes takes long."""
        self.is_less_urgent = True
        self._set_nice(LESS_URGENT)

    def _set_nice(self, value: int) -> None:
        if sys.platform == "win32":
            return
        threads = [self.pid]
        with contextlib.suppress(OSError):  # on Linux every thread has a nice value of its own
            threads = [int(path.name) for path in Path(f"/proc/{self.pid}/task").iterdir()]
        for thread in threads:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread, value)

    def pause(self) -> None:
        """Pause the process, where the system can."""
        if sys.platform != "win32":
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue after `pause`."""
        if sys.platform != "win32":
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End the process at once; a caller that waits for a reply gets an error. For any thread."""
        self._process.kill()

    def end(self) -> None:
        """End the process at once and free the shared memory; for the thread that uses it."""
        self.kill()
        with contextlib.suppress(OSError):  # nobody is left to read what was not written yet
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process.wait()
        self.buffer.close()


def _environment() -> dict[str, str]:
    """An almost empty environment, as ours may hold keys; only our paths, so that it finds the same libraries."""
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONDONTWRITEBYTECODE": "1"}
    # glibc would return a picture's memory to the system, and cause a page fault for each 4 KB of the next one.
    environment |= {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # each would reserve address space
    return environment | {name: os.environ[name] for name in ("SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}


def _read(stream: IO[bytes], replies: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Body of the thread that reads the process's output; puts None at its end."""
    with stream:
        try:
            while line := stream.readline(MAX_REPLY_BYTES):
                reply = json.loads(line)
                if not isinstance(reply, dict):
                    break
                replies.put(reply)
        except (OSError, ValueError, RecursionError) as error:
            logger.debug("A decoding process wrote something that is not a reply: %s", error)
    replies.put(None)


def _no_longer_than(seconds: float) -> OnWait:
    def on_wait(taken: float) -> None:
        if taken > seconds:
            raise TimeoutError

    return on_wait
