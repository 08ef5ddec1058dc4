"""A decoder with certain settings in a process of its own, which measures on request.

Some settings may not work on this machine: repacked weights use code paths of llama.cpp that have been seen to
crash the process (AMX in a virtual machine). Then only this process ends. Two of them can run side by side and be
measured in turns, so that a temporary slowdown of the machine affects both.

    python -m edge_runtime.cli.tuning_trial DECODER SETTINGS     SETTINGS: fields of `Tuning` as JSON

Every line of its input is a number of prompt tokens, at most `CHUNK_TOKENS`; for each it prints `Rates` as JSON.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from edge_runtime.decoder.decoder import Decoder
from edge_runtime.decoder.options import CHUNK_TOKENS, DecoderOptions
from edge_runtime.decoder.sequence_chunk import SequenceChunk
from edge_runtime.loading.tuning import Tuning
from edge_runtime.weights.gguf_file import GGUFFile

REQUEST_PROMPT, REQUEST_ANSWER = 640, 64
"""Tokens of the request that tuning optimises: a large picture with a question, a short answer."""
REPEAT_S = 3.0
TIMEOUT_S = 600.0
"""After this time a sample is abandoned."""
SAMPLE_ANSWER = 6  # tokens generated per sample


@dataclass(frozen=True)
class Rates:
    """Tokens per second."""

    prefill: float
    decode: float

    @property
    def request_s(self) -> float:
        """Seconds of the typical request."""
        return REQUEST_PROMPT / self.prefill + REQUEST_ANSWER / self.decode


@contextmanager
def opened(file: GGUFFile, tuning: Tuning) -> Iterator[Decoder]:
    """A decoder with certain settings."""
    decoder = Decoder(
        file,
        DecoderOptions(
            n_ctx=2 * CHUNK_TOKENS,
            n_threads=tuning.n_threads or 1,
            kv_type=tuning.kv_type,
            n_ubatch=tuning.n_ubatch,
            repack=tuning.repack,
        ),
    )
    try:
        yield decoder
    finally:
        decoder.close()


def decoder_rates(decoder: Decoder, n_prompt: int = CHUNK_TOKENS, n_decode: int = 8) -> Rates:
    """Measure prefill and the generation after it; warm, the best of up to three runs within `REPEAT_S`."""
    n_prompt = max(1, min(n_prompt, decoder.n_ctx - n_decode - 1))
    ids = [int(i) for i in np.random.default_rng(0).integers(0, decoder.config.vocabulary, n_prompt + n_decode)]
    decoder.step([SequenceChunk(0, ids[:8])])  # page in the weights, allocate buffers
    prefill: list[float] = []
    decode: list[float] = []
    while not prefill or (len(prefill) < 3 and sum(prefill) + sum(decode) < REPEAT_S):
        decoder.rewind(0)
        started = time.perf_counter()
        decoder.step([SequenceChunk(0, ids[:n_prompt])])
        decoder.logits()  # llama.cpp may return before it has computed
        prefill.append(time.perf_counter() - started)
        started = time.perf_counter()
        for token_id in ids[n_prompt:]:
            decoder.step([SequenceChunk(0, [token_id])])
            decoder.logits()
        decode.append(time.perf_counter() - started)
    decoder.rewind(0)
    return Rates(n_prompt / min(prefill), n_decode / min(decode))


class Sampling:
    """Samples of one decoder: a piece of prompt that ends at a chunk's end, and a few tokens after it."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        random = np.random.default_rng(0)
        self._ids = [int(i) for i in random.integers(0, decoder.config.vocabulary, CHUNK_TOKENS + SAMPLE_ANSWER)]

    def take(self, n_prompt: int) -> Rates:
        """Measure `n_prompt` tokens that end at position `CHUNK_TOKENS`, where attention has its usual cost.

        What precedes them is computed once and not counted; so are the very first tokens, which page in
        the weights.
        """
        decoder, first = self._decoder, CHUNK_TOKENS - n_prompt
        if not decoder.held(0):
            decoder.step([SequenceChunk(0, self._ids[:8])])
        if decoder.held(0) < first:
            decoder.step([SequenceChunk(0, self._ids[decoder.held(0) : first])])
        decoder.rewind(0, first)
        started = time.perf_counter()
        decoder.step([SequenceChunk(0, self._ids[first:CHUNK_TOKENS])])
        decoder.logits()  # llama.cpp may return before it has computed
        prefilled = time.perf_counter()
        for token_id in self._ids[CHUNK_TOKENS:]:
            decoder.step([SequenceChunk(0, [token_id])])
            decoder.logits()
        return Rates(n_prompt / (prefilled - started), SAMPLE_ANSWER / (time.perf_counter() - prefilled))


class Trial:
    """The process as its parent sees it; use it in a `with` block."""

    def __init__(self, decoder: Path, tuning: Tuning) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edge_runtime.cli.tuning_trial", str(decoder), json.dumps(asdict(tuning))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def sample(self, n_prompt: int) -> Rates | None:
        """Measure once; None when the process ended without a result, now or before."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        giving_up = threading.Timer(TIMEOUT_S, self._process.kill)
        giving_up.start()
        try:
            self._process.stdin.write(f"{n_prompt}\n")
            self._process.stdin.flush()
            return Rates(**json.loads(self._process.stdout.readline()))
        except (OSError, ValueError, TypeError):  # a closed pipe, no line, another line
            return None
        finally:
            giving_up.cancel()

    def __enter__(self) -> Trial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process; further calls do nothing."""
        self._process.kill()  # it has nothing to finish
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # unread data is lost with the pipe
                pipe.close()


def main() -> None:
    """Measure and print until stdin ends."""
    path, settings = sys.argv[1:]
    with opened(GGUFFile(path), Tuning(**json.loads(settings))) as decoder:
        sampling = Sampling(decoder)
        for line in sys.stdin:
            print(json.dumps(asdict(sampling.take(int(line)))), flush=True)


if __name__ == "__main__":
    main()
