"""Frames of one video, decoded and cut ahead of the encoder: a few groups in memory, whatever the video's length.

The scheduler requests a group shortly before it needs it and does other work until it is ready; the reader's own
thread decodes meanwhile. The thread ends when nothing has been requested for a while, and the next request starts it
again, so a forgotten reader costs nothing.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from edge_runtime.errors import EdgeRuntimeError, VideoError
from edge_runtime.inputs.video.frame_source import FrameCursor, FrameSource
from edge_runtime.system.forks import only_here

Pixels = npt.NDArray[np.uint8]
"""ndarray [shape=(height, width, 3), uint8] of a slice"""
Frames = list[list[Pixels]]
"""Slices of every frame of a group."""
Cut = Callable[[Image.Image], list[Pixels]]

MAX_KEPT = 8
"""Groups that are decoded and not yet encoded: at full size 0.6 MB per frame and slice; three are usual."""
LINGER_S = 30.0
"""How long a thread waits for the next request; longer than encoding a group takes."""

logger = logging.getLogger("edge_runtime")


class _Stopped(Exception):  # noqa: N818 - ends the thread, not an error
    """Nobody wants these frames any more."""


class _Reading:
    """What a reader shares with its thread; has no reference to the reader, so that it can be garbage-collected."""

    def __init__(self, source: FrameSource, groups: Sequence[Sequence[int]], cut: Cut) -> None:
        self.source, self.groups, self.cut = source, groups, cut
        self.changed = threading.Condition()
        self.wanted: deque[int] = deque()
        self.done: OrderedDict[int, Frames | Exception] = OrderedDict()
        self.busy: int | None = None
        self.last = -1
        self.n_read = 0
        self.thread: threading.Thread | None = None
        self.stop = threading.Event()

    def next_wanted(self, stop: threading.Event) -> int | None:
        """Wait for a request; None if the thread should end."""
        with self.changed:
            linger_s = 0.0 if self.last == len(self.groups) - 1 else LINGER_S
            self.changed.wait_for(lambda: self.wanted or stop.is_set(), linger_s)
            if stop.is_set() or not self.wanted:
                if self.stop is stop:  # not a thread that was started since
                    self.thread = None
                return None
            self.busy = self.last = self.wanted.popleft()
            return self.busy

    def put(self, number: int, found: Frames | Exception, stop: threading.Event) -> None:
        """Deliver a group, or the error."""
        with self.changed:
            if stop.is_set():
                return
            self.busy = None
            self.done[number] = found
            while len(self.done) > MAX_KEPT:
                self.done.popitem(last=False)
            self.changed.notify_all()

    def end(self) -> threading.Thread | None:
        """Ask the thread to stop, and forget its results; returns the thread."""
        with self.changed:
            self.stop.set()
            self.wanted.clear()
            self.done.clear()
            self.busy, thread, self.thread = None, self.thread, None
            self.changed.notify_all()
        return thread


def _work(reading: _Reading, stop: threading.Event) -> None:
    """Body of the thread."""
    cursor: FrameCursor | None = None

    def watch(share: float) -> None:
        if stop.is_set():
            raise _Stopped

    try:
        while (number := reading.next_wanted(stop)) is not None:
            found: Frames | Exception
            try:
                cursor = cursor or reading.source.open()
                found = []
                for index in reading.groups[number]:
                    found.append(reading.cut(cursor.read(index, watch)))
                    reading.n_read += 1
            except _Stopped:
                return
            except EdgeRuntimeError as error:
                found = error
            except Exception as error:  # a dead thread would leave the scheduler waiting for ever
                logger.debug("A frame of %s could not be read", reading.source.name, exc_info=True)
                found = VideoError(f"{reading.source.name} cannot be decoded ({error}); convert it to MP4 (H.264).")
            reading.put(number, found, stop)
    finally:
        if cursor is not None:
            cursor.close()


def _shut_down(reading: _Reading) -> None:
    """Also called at exit: a thread inside libav would crash the interpreter while it shuts down."""
    thread = reading.end()
    if thread is not None and thread is not threading.current_thread():
        thread.join()


class FrameReader:
    """Decodes groups of frames on request.

    Parameters
    ----------
    groups : positions of the frames in each group.
    cut : picture → pixels of its slices; called on the reader's thread.
    """

    def __init__(self, source: FrameSource, groups: Sequence[Sequence[int]], cut: Cut) -> None:
        self._reading = _Reading(source, groups, cut)
        weakref.finalize(self, only_here(_shut_down), self._reading)

    @property
    def n_read(self) -> int:
        """Frames decoded so far."""
        return self._reading.n_read

    def ask(self, number: int) -> bool:
        """Request a group; True if it is ready, or has failed."""
        reading = self._reading
        with reading.changed:
            if number in reading.done:
                return True
            if number != reading.busy and number not in reading.wanted:
                reading.wanted.append(number)
                if reading.thread is None:
                    reading.stop = threading.Event()
                    reading.thread = threading.Thread(
                        target=_work, args=(reading, reading.stop), name="edge-runtime frames", daemon=True
                    )
                    reading.thread.start()
                reading.changed.notify_all()
        return False

    def wait(self, number: int, timeout_s: float) -> None:
        """Wait until a requested group is ready, or until the timeout."""
        with self._reading.changed:
            self._reading.changed.wait_for(lambda: number in self._reading.done, timeout_s)

    def take(self, number: int, *, last: bool) -> Frames:
        """Pixels of a group; waits for them.

        Parameters
        ----------
        last : they will not be needed again soon.

        Raises
        ------
        VideoError
            When a frame cannot be decoded.
        """
        while True:
            self.ask(number)
            self.wait(number, 1.0)
            with self._reading.changed:
                found = self._reading.done.get(number)
                if found is not None and (last or isinstance(found, Exception)):
                    del self._reading.done[number]
            if isinstance(found, Exception):
                raise found
            if found is not None:
                return found

    def release(self) -> None:
        """Stop decoding; later requests start again."""
        self._reading.end()
