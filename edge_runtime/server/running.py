"""An application → a process that serves it: sockets, signals, and a shutdown that lets running answers finish."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from edge_runtime.errors import BackendUnavailable
from edge_runtime.server.hard_end import HardEnd
from edge_runtime.server.middleware.connections import KEEP_ALIVE_S, guarded
from edge_runtime.server.settings import Settings
from edge_runtime.server.state import server_of

AFTERWARDS_S = 0.7
"""For the last messages to clients whose answers were stopped at the end of the grace time."""
HARD_END_S = 1.3
"""After the grace time: when the process exits, whatever is still running."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """uvicorn's server, which reports its address and finishes running answers before it ends.

    After the first signal no connection is accepted; running answers have the grace time, then they are stopped and
    their clients notified. A moment later the process exits, whatever a thread is doing (`hard_end`). A second Ctrl-C
    ends at once. Unlike in uvicorn, signals are not raised again at the end, since models have to be closed first.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self.state, self.settings = server_of(app), settings
        self.caught: int | None = None
        """The signal that ended it."""
        config = uvicorn.Config(
            app,
            lifespan="off",  # `serve` is inside it, so that its errors are ours
            log_config=None,
            access_log=False,
            server_header=False,  # would only help attackers
            proxy_headers=False,  # nothing here depends on a client's claimed address
            http=guarded(settings),
            ws="none",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=settings.grace_s + AFTERWARDS_S,  # type: ignore[arg-type] # asyncio takes it
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Listen for signals while the block lasts."""
        with contextlib.ExitStack() as stack:
            for number in SIGNALS:
                try:
                    before = signal.signal(number, self.handle_exit)
                except ValueError:  # not in the main thread: the caller ends the server
                    break
                stack.callback(self._restore, number, before)
            else:
                hard_end = HardEnd(self.settings.grace_s + HARD_END_S, AFTERWARDS_S)
                hard_end.watch()
                stack.callback(self._ended, hard_end)
            yield

    def _restore(self, number: int, before: Any) -> None:
        if self.caught is None:  # otherwise a second Ctrl-C must be heard until the process has ended
            signal.signal(number, before)

    def _ended(self, hard_end: HardEnd) -> None:
        if self.caught is None:  # otherwise the remaining shutdown has to end in time, too
            hard_end.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the shutdown."""
        self.caught = sig
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running answers finish, and stop those that take too long."""
        self.state.batches.stop()  # nobody waits for them: they go on after the next start
        stopping = asyncio.get_running_loop().call_later(self.settings.grace_s, self.state.inference.stop)
        try:
            await super().shutdown(sockets)
        finally:
            stopping.cancel()


async def serve(app: FastAPI, settings: Settings, on_start: Callable[[str, Server], None]) -> int | None:
    """Load the owner's models and serve until a signal ends the server.

    Parameters
    ----------
    on_start : called with the address once the server answers.

    Returns
    -------
    caught : the signal that ended it.

    Raises
    ------
    EdgeRuntimeError
        When a model cannot be loaded, or the address is not available.
    """
    with contextlib.closing(_listen(settings)) as listener:
        async with app.router.lifespan_context(app):
            server = Server(app, settings)
            server.state.inference.decoders.start()
            running = asyncio.create_task(server.serve([listener]))
            while not server.started and not running.done():
                await asyncio.sleep(0.01)
            on_start(_address(settings, listener), server)
            await running
            return server.caught


def _listen(settings: Settings) -> socket.socket:
    """Bind the address before anything slow is done.

    Raises
    ------
    BackendUnavailable
        When it is not available.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host.strip("[]"), settings.port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BackendUnavailable(
            f"The address {settings.host} port {settings.port} is not available: {reason}; end what uses it (Ollama "
            "listens on 11434), or choose another with --port."
        ) from None


def _address(settings: Settings, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    host = settings.host.strip("[]")
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
