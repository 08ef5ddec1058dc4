"""One measurement of a decoder with certain settings, in a process of its own.

Settings are tried that may not work on this machine: repacked weights bring code paths of llama.cpp along that have
been seen to end the process (AMX in a virtual machine). Then it is this process that ends.

    python -m edge_runtime.trial DECODER SETTINGS     SETTINGS: fields of `Tuning` as JSON; prints `Rates` as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from edge_runtime.decoder import CHUNK_TOKENS, Decoder, DecoderOptions, Part
from edge_runtime.tuning import Tuning
from edge_runtime.weights import GGUFFile

REQUEST_PROMPT, REQUEST_ANSWER = 640, 64
"""Tokens of the request that tuning is for: a large picture with a question, a short answer."""
REPEAT_S = 3.0
MOST_S = 600.0
"""After which a trial is given up."""


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
    """Measure prefill and generation behind it; warm, the best of up to three repeats within `REPEAT_S`."""
    n_prompt = max(1, min(n_prompt, decoder.n_ctx - n_decode - 1))
    ids = [int(i) for i in np.random.default_rng(0).integers(0, decoder.config.vocabulary, n_prompt + n_decode)]
    decoder.step([Part(0, ids[:8])])  # pages of the weights come in, buffers are made
    prefill: list[float] = []
    decode: list[float] = []
    while not prefill or (len(prefill) < 3 and sum(prefill) + sum(decode) < REPEAT_S):
        decoder.rewind(0)
        started = time.perf_counter()
        decoder.step([Part(0, ids[:n_prompt])])
        decoder.logits()  # llama.cpp may return before it has computed
        prefill.append(time.perf_counter() - started)
        started = time.perf_counter()
        for token_id in ids[n_prompt:]:
            decoder.step([Part(0, [token_id])])
            decoder.logits()
        decode.append(time.perf_counter() - started)
    decoder.rewind(0)
    return Rates(n_prompt / min(prefill), n_decode / min(decode))


def run_trial(decoder: Path, tuning: Tuning) -> Rates | None:
    """Measure in a child process; None when that ended without a result."""
    command = [sys.executable, "-m", "edge_runtime.trial", str(decoder), json.dumps(asdict(tuning))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_S, check=True)
        return Rates(**json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.SubprocessError, ValueError, TypeError, LookupError):
        return None


def main() -> None:
    """Measure and print."""
    path, settings = sys.argv[1:]
    with opened(GGUFFile(path), Tuning(**json.loads(settings))) as decoder:
        print(json.dumps(asdict(decoder_rates(decoder))))


if __name__ == "__main__":
    main()
