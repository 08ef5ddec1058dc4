"""End the process in time after a signal, whatever its threads are doing.

Python runs signal handlers only in the main thread, between two of its instructions, and waits for its other
threads before it exits: a decoder that never returns blocks both. Here a thread of its own receives signals through
`signal.set_wakeup_fd`, and the last step is `os._exit`. One case is out of reach: code that has held the
interpreter's lock since before the signal came.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import threading
import time

logger = logging.getLogger("edge_runtime.server")

FLUSH_S = 0.3
"""For the last log lines; a thread that holds a lock of the log must not delay the exit."""
SECOND_LINE_S = 2.0
"""After the deadline, since on a busy machine the exit may only be late."""
CODES = {signal.SIGINT: 130}
"""Exit codes, as for an ordinary end; 0 for other signals, since the end was asked for."""


class HardEnd:
    """Exits the process some time after the first signal.

    Parameters
    ----------
    seconds : from the first signal on.
    again_s : from a second Ctrl-C on.
    """

    def __init__(self, seconds: float, again_s: float) -> None:
        self._seconds, self._again_s = seconds, again_s
        self._heard, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        self._before = -1

    def watch(self) -> None:
        """Start to listen.

        Raises
        ------
        ValueError
            When this is not the main thread.
        """
        self._before = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._wait, name="edge-runtime end", daemon=True).start()

    def close(self) -> None:
        """Stop listening. Not called after a signal: the remaining shutdown has to end in time, too."""
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(self._before)
        self._wakes.close()  # the thread sees the end of the connection

    def _wait(self) -> None:
        first: int | None = None
        end: float | None = None
        with self._heard:
            while end is None or time.monotonic() < end:
                ready, _, _ = select.select([self._heard], [], [], None if end is None else end - time.monotonic())
                if not ready:
                    break
                numbers = self._heard.recv(64)
                if not numbers:
                    return
                for number in numbers:
                    if number not in (signal.SIGINT, signal.SIGTERM):
                        continue
                    if end is None:
                        first, end = number, time.monotonic() + self._seconds
                        _end_without_python(self._seconds)
                    elif number == signal.SIGINT:
                        end = min(end, time.monotonic() + self._again_s)
                        _end_without_python(self._again_s)
        self._leave(CODES.get(signal.Signals(first or signal.SIGTERM), 0))

    def _leave(self, code: int) -> None:
        last_words = threading.Thread(target=_last_words, daemon=True)
        last_words.start()
        last_words.join(FLUSH_S)
        os._exit(code)


def _end_without_python(seconds: float) -> None:
    """A second line of defence: a C thread ends the process if this thread cannot get the interpreter's lock."""
    with contextlib.suppress(RuntimeError, ValueError, OSError, AttributeError):  # a stderr that is no file
        faulthandler.dump_traceback_later(seconds + SECOND_LINE_S, exit=True)


def _last_words() -> None:
    left = [thread.name for thread in threading.enumerate() if not thread.daemon]
    logger.warning("The server did not shut down in time and exits now. Still running: %s.", ", ".join(left))
    for handler in (*logging.getLogger().handlers, *logger.handlers):
        handler.flush()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
