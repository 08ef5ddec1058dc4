"""The single inference thread: requests enter through a queue, events leave through an iterator.

Everything that computes runs here: numba's parallel kernels may be entered by one thread at a time, and a llama.cpp
context belongs to one thread. Callers prepare requests (decode pictures, render prompts) on their own threads.
Requests are answered one after the other; the interface is made for many at once.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from edge_runtime.decoder import Cancelled, Decoder
from edge_runtime.encoder import Group, ImageEncoder
from edge_runtime.errors import EdgeRuntimeError, ModelFileError
from edge_runtime.prompt import Prompt
from edge_runtime.sampling import Sampler, SamplingOptions, is_finite
from edge_runtime.streaming import Piece, TextStream
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.visual_cache import VisualTokenCache
from edge_runtime.weights import Float32

FinishReason = Literal["stop", "length", "cancelled"]
R = TypeVar("R")


@dataclass(frozen=True)
class Progress:
    """How far the work before the first token is."""

    stage: Literal["encode", "prefill"]
    done: int
    total: int


@dataclass(frozen=True)
class Finished:
    """The last event of a request."""

    reason: FinishReason
    completion_tokens: int
    cached_tokens: int
    """Tokens of the prompt that needed no prefill."""
    timings_s: dict[str, float]
    """encode, prefill, first_token (since submission), decode"""


Event = Progress | Piece | Finished


@dataclass(frozen=True)
class Request:
    """A prepared request."""

    prompt: Prompt
    groups: list[Group]
    """Slices behind `prompt.bounds`, one group for each."""
    digests: list[bytes]
    """Of the groups; see `pipeline.group_digest`."""
    sampling: SamplingOptions
    thinking: bool
    max_tokens: int
    stop: Sequence[str] = ()


@dataclass
class _Job:
    """Something for the thread to do, and where its results go."""

    run: Callable[[_Job], None]
    stopping: threading.Event
    """Set when the engine closes; the same for all jobs."""
    events: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def is_cancelled(self) -> bool:
        return self.cancelled.is_set() or self.stopping.is_set()


class Running:
    """A submitted request: take its events one by one, or cancel it. Forgetting it cancels it too."""

    def __init__(self, job: _Job) -> None:
        self._job = job

    def next_event(self) -> Event:
        """Wait for the next event; `Finished` is the last.

        A Ctrl-C while waiting loses nothing: the next call goes on.

        Raises
        ------
        EdgeRuntimeError
            When the request failed; no event follows.
        """
        event = _next(self._job.events)
        if isinstance(event, BaseException):
            raise event
        return event  # type: ignore[no-any-return]

    def cancel(self) -> None:
        """End the request; its last event says `cancelled`."""
        self._job.cancelled.set()

    def __del__(self) -> None:
        """Nobody listens any more."""
        self.cancel()


def _next(events: queue.SimpleQueue[Any]) -> Any:
    """Wait for an event in short steps, so that Ctrl-C is noticed on every system."""
    while True:
        try:
            return events.get(timeout=0.5)
        except queue.Empty:
            continue


class Engine:
    """Owns encoder and decoder, and the thread that runs them."""

    def __init__(self, encoder: ImageEncoder, decoder: Decoder, tokenizer: Tokenizer) -> None:
        self._encoder, self._decoder, self._tokenizer = encoder, decoder, tokenizer
        self._visual_tokens = VisualTokenCache()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name="edge-runtime inference", daemon=True)
        self._thread.start()
        # Runs at exit too: a thread inside llama.cpp while the interpreter goes down would crash it.
        self._close = weakref.finalize(self, _shut_down, self._jobs, self._stopping, self._thread, decoder)

    def submit(self, request: Request) -> Running:
        """Queue a request.

        Raises
        ------
        PromptTooLongError
            When the prompt does not fit; nothing is computed then.
        """
        self._decoder.check_length(len(request.prompt.ids))
        started = time.perf_counter()
        return Running(self._put(lambda job: self._answer(request, job, started)))

    def call(self, function: Callable[[], R]) -> R:
        """Run a function on the inference thread and return its result; for work outside a request."""
        job = self._put(lambda job: job.events.put((function(),)))
        result = _next(job.events)
        if isinstance(result, BaseException):
            raise result
        return result[0]  # type: ignore[no-any-return]

    def _put(self, run: Callable[[_Job], None]) -> _Job:
        if not self._close.alive:
            raise EdgeRuntimeError("The model was closed; load it again with Model.load.")
        job = _Job(run, self._stopping)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """Stop the thread and free the model."""
        self._close()

    def embed(self, prompt: Prompt, tokens: Mapping[int, Float32], start: int = 0) -> Float32:
        """One stream of embeddings: token rows with the visual tokens in their places.

        Parameters
        ----------
        tokens : place in `prompt.bounds` → ndarray [shape=(queries, hidden), float32]; places that end before `start`
            may be left out.
        start : first position wanted.

        Returns
        -------
        embeddings : ndarray [shape=(n prompt tokens - start, hidden), float32]
        """
        embeddings = np.array(self._decoder.embed(np.asarray(prompt.ids[start:], np.int64)))
        for place, (first, end) in enumerate(prompt.bounds):
            if end > start:
                embeddings[max(first, start) - start : end - start] = tokens[place][max(0, start - first) :]
        return embeddings

    def _answer(self, request: Request, job: _Job, started: float) -> None:
        timings = dict.fromkeys(("encode", "prefill", "first_token", "decode"), 0.0)
        n_tokens = n_cached = 0

        def finish(reason: FinishReason) -> None:
            job.events.put(Finished(reason, n_tokens, n_cached, timings))

        try:
            clock = _Clock()
            keys = _keys(request)
            n_cached = self._decoder.rewind(keys)
            embeddings = self.embed(request.prompt, self._visual(request, n_cached, job), n_cached)
            timings["encode"] = clock.lap()
            self._prefill(embeddings, keys[n_cached:], job)
            timings["prefill"] = clock.lap()
            sampler = Sampler(request.sampling, self._decoder.config.vocabulary, self._decoder.n_ctx)
            try:
                for n_tokens, reason in self._generate(request, job, sampler):
                    timings["decode"] = clock.elapsed()
                    if n_tokens == 1:
                        timings["first_token"] = time.perf_counter() - started
                    if reason:
                        finish(reason)
            finally:
                sampler.close()
        except Cancelled:
            finish("cancelled")

    def _visual(self, request: Request, start: int, job: _Job) -> dict[int, Float32]:
        """Visual tokens of all places that end behind position `start`; pictures before it are not even looked at."""
        digests = {i: request.digests[i] for i, (_, end) in enumerate(request.prompt.bounds) if end > start}
        known = {digest: self._visual_tokens.get(digest) for digest in digests.values()}
        missing = {digest: request.groups[i] for i, digest in digests.items() if known[digest] is None}
        found = dict(zip(missing, self._encode([*missing.values()], job), strict=True))
        for digest, tokens in found.items():
            self._visual_tokens.put(digest, tokens)
        found |= {digest: tokens for digest, tokens in known.items() if tokens is not None}
        return {i: found[digest] for i, digest in digests.items()}

    def _encode(self, groups: list[Group], job: _Job) -> list[Float32]:
        total = sum(len(group) for group in groups)

        def on_slices(n_done: int) -> None:
            job.events.put(Progress("encode", n_done, total))
            if job.is_cancelled():
                raise Cancelled

        if groups:
            on_slices(0)
        return self._encoder.encode(groups, on_slices)

    def _prefill(self, embeddings: Float32, keys: list[Hashable], job: _Job) -> None:
        job.events.put(Progress("prefill", 0, len(embeddings)))
        self._decoder.prefill(embeddings, keys, job.is_cancelled)
        job.events.put(Progress("prefill", len(embeddings), len(embeddings)))
        if not is_finite(self._decoder.logits()):
            raise ModelFileError(
                "The decoder computes values that are not finite; its file is damaged: download or convert it again."
            )

    def _generate(self, request: Request, job: _Job, sampler: Sampler) -> Iterator[tuple[int, FinishReason | None]]:
        """Sample and decode until a stop; yields the number of tokens so far and, at the end, the reason."""
        decoder, stops = self._decoder, self._tokenizer.stop_ids
        stream = TextStream(self._tokenizer, thinking=request.thinking, stop=request.stop)
        limit = min(request.max_tokens, decoder.n_ctx - decoder.n_past)
        n_tokens = 0
        reason: FinishReason | None = None
        while reason is None:
            token_id = sampler.sample(decoder.context)
            n_tokens += 1
            if token_id in stops:
                reason = "stop"
                continue
            _emit(job, stream.feed(token_id))
            if stream.stopped:
                reason = "stop"
            elif n_tokens >= limit:
                reason = "length"
            else:
                yield n_tokens, None
                decoder.decode(token_id, job.is_cancelled)
        _emit(job, stream.finish())
        yield n_tokens, reason


def _keys(request: Request) -> list[Hashable]:
    """What stands at each position of the prompt: a token, or a place in a group's visual tokens."""
    keys: list[Hashable] = list(request.prompt.ids)
    for digest, (first, end) in zip(request.digests, request.prompt.bounds, strict=True):
        keys[first:end] = [(digest, i) for i in range(end - first)]
    return keys


def _emit(job: _Job, pieces: list[Piece]) -> None:
    for piece in pieces:
        job.events.put(piece)


class _Clock:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def lap(self) -> float:
        seconds, self._start = self.elapsed(), time.perf_counter()
        return seconds


def _work(jobs: queue.SimpleQueue[_Job | None]) -> None:
    """Body of the thread. It must not refer to the engine, or that would never be collected."""
    while (job := jobs.get()) is not None:
        try:
            job.run(job)
        except BaseException as error:  # noqa: BLE001 - handed to the caller, who raises it
            job.events.put(error)
        del job


def _shut_down(
    jobs: queue.SimpleQueue[_Job | None],
    stopping: threading.Event,
    thread: threading.Thread,
    decoder: Decoder,
) -> None:
    stopping.set()
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join()
    decoder.close()
