"""The decoder alone in a process of its own: prompts, and calls of some rows, with our kernels or llama.cpp's."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.harness.child import Skipped, serve

PROMPT = 8
"""Positions that each sequence holds before its calls are timed."""


class DecoderCalls:
    """A decoder file. Options: decoder, threads, kernels, repack."""

    def __init__(self, options: dict[str, Any]) -> None:
        from edge_runtime.decoder.decoder import Decoder
        from edge_runtime.decoder.options import DecoderOptions
        from edge_runtime.decoder.sequence_chunk import SequenceChunk

        self._chunk = SequenceChunk
        self.decoder = Decoder(
            options["decoder"],
            DecoderOptions(
                n_ctx=4096,
                n_threads=options["threads"],
                n_sequences=16,
                kernels=options["kernels"],
                repack=options["repack"],
                amx_prefill=None if options["kernels"] else False,
            ),
        )
        if options["kernels"] and not self.decoder.uses_kernels:
            raise Skipped("llama.cpp does not take the kernels")
        random = np.random.default_rng(0)
        self._ids = [int(i) for i in random.integers(0, self.decoder.config.vocabulary, 4096)]

    def _step(self, chunks: list[Any]) -> float:
        started = time.perf_counter()
        self.decoder.step(chunks)
        self.decoder.logits()  # llama.cpp may return before it has computed
        return time.perf_counter() - started

    def prompt(self, n: int) -> float:
        """Seconds of a prompt of n tokens, in chunks of at most a call's size."""
        self.decoder.rewind(0)
        size = self.decoder.n_batch
        return sum(self._step([self._chunk(0, self._ids[i : min(i + size, n)])]) for i in range(0, n, size))

    def rows(self, n: int, repeats: int) -> list[float]:
        """Seconds of each of some calls with n rows, one for each of n sequences."""
        for sequence in range(n):
            self.decoder.rewind(sequence)
            self.decoder.step([self._chunk(sequence, self._ids[sequence : sequence + PROMPT])])
        return [
            self._step([self._chunk(sequence, [self._ids[sequence + i]]) for sequence in range(n)])
            for i in range(repeats)
        ]

    def bandwidth(self) -> float:
        """GB/s that all threads together read from memory."""
        from benchmarks.harness.peaks import read_bandwidth

        return read_bandwidth()

    def close(self) -> None:
        """Free the model."""
        self.decoder.close()


if __name__ == "__main__":
    serve(DecoderCalls)
