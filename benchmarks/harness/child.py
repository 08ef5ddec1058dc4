"""One side of a benchmark in a process of its own, called over a pipe; it is stopped while others are measured.

Parent and child exchange JSON lines: {"call": name, ...arguments} → {"result": …}, {"skip": reason}, {"error": text}.
Threads of OpenMP and of thread pools keep spinning after their work and would take time from the next side. So a
child is stopped (SIGSTOP) between its calls; on systems without that signal, a pause has to do.

The child's module has a class that `serve` creates from the options; its public methods can be called.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.memory import PERIOD_S, Memory, measure

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE_ROOTS = (".", "kernels", "converters")
CAN_STOP = hasattr(signal, "SIGSTOP")
PAUSE_S = 0.2 if CAN_STOP else 1.0


class Skipped(Exception):  # noqa: N818 - nothing went wrong
    """A side that cannot run here, with the reason."""


class SideError(Exception):
    """A side that failed, with its output."""


def require(*modules: str) -> None:
    """Skip this side unless all modules can be imported."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise Skipped(f"{name} cannot be imported ({error}); it is in the extra [bench]") from None


# --- the child's end ----------------------------------------------------------------------------------------


def serve(make: Callable[[dict[str, Any]], Any]) -> None:
    """Answer calls until the parent closes the pipe. Libraries' stdout is redirected to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    side: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("call")
        reply: dict[str, Any]
        try:
            if name == "start":
                side = make(request)
                reply = {"result": None}
            else:
                reply = {"result": getattr(side, name)(**request)}
        except Skipped as reason:
            reply = {"skip": str(reason)}
        except Exception as error:  # noqa: BLE001 - whatever a peer raises, the parent reports it
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


# --- the parent's end ---------------------------------------------------------------------------------------


class Peak:
    """Samples the memory of a process tree in a thread; `peak` is the largest of each kind seen."""

    def __init__(self, pid: int, period_s: float = PERIOD_S) -> None:
        self.peak, self._pid, self._period = Memory(), pid, period_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _look(self) -> None:
        for name, value in asdict(measure(self._pid)).items():
            setattr(self.peak, name, max(getattr(self.peak, name), value))

    def _sample(self) -> None:
        while not self._done.wait(self._period):
            self._look()

    def __enter__(self) -> Peak:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()


class Child:
    """A side as the parent sees it.

    Parameters
    ----------
    module : the side's module, run with -m.
    options : arguments for its class; `threads` also sets the usual environment variables.
    log : file for its output.

    Raises
    ------
    Skipped
        When the side cannot run here.
    SideError
        When it fails; calls raise it, too.
    """

    def __init__(self, module: str, options: dict[str, Any], log: Path) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env=environment(options.get("threads")),
                text=True,
                encoding="utf-8",
            )
        self.call("start", **options)

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def call(self, name: str, **arguments: Any) -> Any:
        """Call one of the side's methods and wait for its result."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._running():
            try:
                self._process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                raise SideError(self._last_words()) from None
            line = self._process.stdout.readline()
        if not line:
            raise SideError(self._last_words())
        reply = json.loads(line)
        if "skip" in reply:
            self.close()
            raise Skipped(reply["skip"])
        if "error" in reply:
            raise SideError(reply["error"])
        return reply["result"]

    def watch(self, name: str, **arguments: Any) -> tuple[Any, Memory]:
        """Call a method, and return the peak memory meanwhile, too."""
        with Peak(self.pid) as sampler:
            result = self.call(name, **arguments)
        return result, sampler.peak

    def memory(self) -> Memory:
        """Memory in use now."""
        return measure(self.pid)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        self._signal("SIGCONT")
        try:
            yield
        finally:
            if self._process.poll() is None:
                self._signal("SIGSTOP")

    def _signal(self, name: str) -> None:
        if CAN_STOP:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(getattr(signal, name))

    def _last_words(self) -> str:
        code = self._process.wait(10)
        lines = self._log.read_text("utf-8", errors="replace").strip().splitlines()
        return f"it ended with exit code {code}; last line: {lines[-1] if lines else 'none'}"

    def close(self) -> None:
        """End the process."""
        self._signal("SIGCONT")
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def environment(threads: int | None) -> dict[str, str]:
    """Environment of a child; folders already in PYTHONPATH come first, as they may hold another build of a peer."""
    roots = [*filter(None, [os.environ.get("PYTHONPATH")]), *(str(ROOT / part) for part in SOURCE_ROOTS)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(roots)}
    if threads:
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment |= dict.fromkeys(names, str(threads))
    return environment


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Result and seconds of one call."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start
