"""One process that decodes foreign files, seen from the process that it works for: started, asked, held, ended.

Knows how requests and replies are written (`decoding_process`), and nothing of pictures.
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
"""For the process to begin, on a machine that is busy."""
LOOK_S = 0.05
"""How often whoever waits looks round."""
MOST_REPLY_BYTES = 64 << 20
"""The times of a video of days; a longer line is no reply."""
CLEAR_S = 10.0
URGENCY, LESS_URGENT = 5, 10  # nice values: running answers go first, and then whatever does not take long

Look = Callable[[float], None]
"""Called now and then with the seconds that a request has taken; what it raises ends the worker."""


class WorkerEnded(Exception):  # noqa: N818 - says what happened
    """The process ended, or wrote what is no reply."""


class Worker:
    """A running process. Used by one thread at a time.

    Parameters
    ----------
    most_bytes : of its memory.

    Raises
    ------
    BackendUnavailable
        When it cannot be started.
    """

    def __init__(self, most_bytes: int) -> None:
        self.buffer = SharedBuffer()
        self.n_requests = 0
        self.is_less_urgent = False
        self._replies: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "edge_runtime.inputs.workers.process", str(most_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                pass_fds=self.buffer.inherited,
                # Ctrl-C in the terminal is for the process that it works for. Not a session of its own: Linux gives
                # sessions equal shares of the processor (autogroup), whatever their nice values.
                process_group=0,
            )
        except OSError as error:
            self.buffer.close()
            raise BackendUnavailable(
                f"Pictures are decoded in a process of its own, which cannot be started ({error}); see if memory or "
                "processes are short."
            ) from None
        self._set_nice(URGENCY)
        assert self._process.stdout is not None
        threading.Thread(
            target=_read, args=(self._process.stdout, self._replies), name="edge-runtime decoding", daemon=True
        ).start()
        try:
            self.held = self._next(_no_longer_than(START_S))
            """What the process has given up, see `sandbox`: name to whether the system does that."""
        except (WorkerEnded, TimeoutError):
            self.end()
            raise BackendUnavailable(
                "Pictures are decoded in a process of its own, which did not start; see if memory is short."
            ) from None

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def ask(
        self,
        request: Mapping[str, Any],
        look: Look,
        processor_s: float,
        on_share: Callable[[float], None] = lambda share: None,
    ) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Parameters
        ----------
        look : what it raises ends the process, and is raised.
        processor_s : processor time after which the process ends by itself.

        Raises
        ------
        WorkerEnded
        """
        self.n_requests += 1
        try:
            self._send({**request, "processor_s": processor_s})
            while True:
                reply = self._next(look, on_share)
                if reply.get("number") == self.n_requests:
                    return reply
        except OSError:
            self.end()
            raise WorkerEnded from None
        except BaseException:
            self.end()
            raise

    def clear(self) -> None:
        """Have it forget what it has open; it does so when it comes to it.

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

    def _next(self, look: Look, on_share: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
        began = time.monotonic()
        while True:
            try:
                reply = self._replies.get(timeout=LOOK_S)
            except queue.Empty:
                look(time.monotonic() - began)
                continue
            if reply is None:
                raise WorkerEnded
            if "share" not in reply:
                return reply
            on_share(float(reply["share"]))
            look(time.monotonic() - began)

    @property
    def processor_s(self) -> float | None:
        """Processor time that the process has taken; None where the system does not tell it."""
        try:
            told = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(told[11]) + int(told[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError, ValueError):
            return None

    def be_less_urgent(self) -> None:
        """Let others go first from here on: whatever it decodes takes long."""
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
        """Stand still, where the system can do that."""
        if sys.platform != "win32":
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after `pause`."""
        if sys.platform != "win32":
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End the process at once; whoever waits for a reply is told. For any thread."""
        self._process.kill()

    def end(self) -> None:
        """End the process at once, whatever it is doing, and free what it shared; for the thread that uses it."""
        self.kill()
        with contextlib.suppress(OSError):  # what was not written yet has nobody to read it
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process.wait()
        self.buffer.close()


def _environment() -> dict[str, str]:
    """Nothing of ours: there may be keys in it. This interpreter's own paths, so that it finds the same libraries."""
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONDONTWRITEBYTECODE": "1"}
    # glibc would give a picture's memory back to the system, and take a page fault for each 4 KB of the next one's.
    environment |= {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # each would reserve address space
    return environment | {name: os.environ[name] for name in ("SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}


def _read(stream: IO[bytes], replies: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Body of the thread that reads what the process writes; None when there will be no more."""
    with stream:
        try:
            while line := stream.readline(MOST_REPLY_BYTES):
                reply = json.loads(line)
                if not isinstance(reply, dict):
                    break
                replies.put(reply)
        except (OSError, ValueError, RecursionError) as error:
            logger.debug("A decoding process wrote what is no reply: %s", error)
    replies.put(None)


def _no_longer_than(seconds: float) -> Look:
    def look(taken: float) -> None:
        if taken > seconds:
            raise TimeoutError

    return look
