"""Chat template and conversation → rendered text, within limits of time, memory and output.

The official template comes with this package and is rendered here. Any other comes from a model file, so anybody may
have written it: `template_process` renders it in a process that is ended when it takes too long and started again for
the next one. That costs a tenth of a second the first time, and a millisecond after that.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any

from edge_runtime.errors import MessageError, ModelFileError
from edge_runtime.prompt import template_process
from edge_runtime.prompt.long_text import LONG_TEXTS
from edge_runtime.prompt.template_process import MAX_BYTES, MAX_S, TemplateFault
from edge_runtime.system.forks import only_here

OFFICIAL_CHAT_TEMPLATE = resources.files("edge_runtime.prompt").joinpath("chat_template.jinja").read_text("utf-8")
"""The chat template of MiniCPM-V 4.5, for files without one."""
MAX_PROCESSES = 3
"""Kept for their next rendering; each takes about 30 MB."""
START_S = 60.0
"""Time for the process to start on a busy machine."""


def render(template: str, context: dict[str, Any], check: Callable[[], None] = lambda: None) -> str:
    """Render a chat template.

    Parameters
    ----------
    context : its variables, of JSON types.
    check : called often if the conversation is long; what it raises ends the work.

    Raises
    ------
    MessageError
        When the template refuses the conversation.
    ModelFileError
        When it is not a template, or exceeds a limit.
    """
    try:
        if template == OFFICIAL_CHAT_TEMPLATE:
            return template_process.render(template, context, check)
        with LONG_TEXTS.without():
            return shared_renderers().render(template, context)
    except TemplateFault as error:
        if error.fault == "template":
            raise ModelFileError(f"The model's chat template {error}.") from None
        raise MessageError(
            f"The model's chat template refuses this conversation: {error}. Check the order and roles of the "
            "messages."
        ) from None


@cache
def shared_renderers() -> Renderers:
    """Those of this process."""
    renderers = Renderers()
    atexit.register(only_here(renderers.close))
    return renderers


if hasattr(os, "register_at_fork"):
    # The processes are the parent's, and a lock may be held by a thread that is not here.
    os.register_at_fork(after_in_child=shared_renderers.cache_clear)


class Renderers:
    """A process for each template, so that one that computes for long delays no other's users."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Renderer] = OrderedDict()
        """Template → its process, the last used at the end."""

    def render(self, template: str, context: dict[str, Any]) -> str:
        """As `Renderer.render`; starts a process if there is none."""
        with self._lock:
            renderer = self._known.setdefault(template, Renderer())
            self._known.move_to_end(template)
            renderer.n_users += 1
        try:
            return renderer.render(template, context)
        finally:
            with self._lock:
                renderer.n_users -= 1
                idle = [name for name, known in self._known.items() if not known.n_users]
                surplus = [self._known.pop(name) for name in idle[: max(0, len(self._known) - MAX_PROCESSES)]]
            for unused in surplus:
                unused.close()

    def close(self) -> None:
        """End all processes."""
        for renderer in [*self._known.values()]:
            renderer.close()


class Renderer:
    """The process that renders, replaced after it had to be ended. One rendering at a time."""

    def __init__(self) -> None:
        self.n_users = 0
        """Threads that render, or wait for that."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, template: str, context: dict[str, Any]) -> str:
        """Render a template like `template_process.render`, but for at most `MAX_S`.

        Raises
        ------
        TemplateFault
        """
        request = json.dumps({"template": template, "context": context}).encode() + b"\n"
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            reply, is_late = self._ask(request)
            if reply is None:
                self.close()
                raise TemplateFault(
                    "template",
                    (
                        f"took longer than {MAX_S:g} s"
                        if is_late
                        else f"ended the process that renders it, which may take {MAX_BYTES >> 20} MB"
                    )
                    + "; use a file with the official template",
                )
        if "text" not in reply:
            raise TemplateFault(reply["fault"], reply["error"])
        return str(reply["text"])

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                with contextlib.suppress(OSError):  # nobody is left to read what was not written yet
                    stream.close()
            process.wait()

    def _start(self) -> None:
        self.close()
        # An empty environment: a template that escaped from the sandbox would find no keys. Only this interpreter's
        # paths, so that it finds the same Jinja.
        environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        environment |= {name: os.environ[name] for name in ("SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", template_process.__name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            raise TemplateFault(
                "template", f"needs a process of its own, which cannot be started ({error})"
            ) from None
        if self._answer(START_S)[0] is None:
            self.close()
            raise TemplateFault("template", "needs a process of its own, which did not start; check free memory")

    def _ask(self, request: bytes) -> tuple[dict[str, Any] | None, bool]:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
        except OSError:  # it died while idle
            return None, False
        return self._answer(MAX_S)

    def _answer(self, timeout_s: float) -> tuple[dict[str, Any] | None, bool]:
        """The next line of the process, or None and whether it ran out of time."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            process.kill()

        timer = threading.Timer(timeout_s, end)
        timer.daemon = True
        timer.start()
        try:
            line = process.stdout.readline()
        finally:
            timer.cancel()
        try:
            return json.loads(line), False
        except ValueError:
            return None, is_late.is_set()
