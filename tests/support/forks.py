"""Work in a child process that is forked."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable
from typing import Any

from edge_runtime import EdgeRuntimeError


def in_a_fork(work: Callable[[], Any], *, leave: Callable[[int], Any] = os._exit) -> str:
    """Run it in a child: the text of its result or error, within a minute."""

    def run(end: Any) -> None:
        try:
            end.send(str(work()))
        except EdgeRuntimeError as error:
            end.send(str(error))
        end.close()
        leave(0)

    receiving, sending = multiprocessing.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, that threads are lost
        child = multiprocessing.get_context("fork").Process(target=run, args=(sending,))
        child.start()
    sending.close()
    try:
        assert receiving.poll(60), "the child waits for ever"
        return str(receiving.recv())
    finally:
        child.join(20)
        has_ended = child.exitcode is not None
        child.kill()
        child.join()
        assert has_ended, "the child does not end"
        assert child.exitcode == 0
