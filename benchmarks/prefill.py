"""Prompts through the decoder: our kernels inside llama.cpp against llama.cpp alone, with and without repacking.

    python benchmarks/prefill.py DECODER.gguf [--tokens 128 512 2048] [--repeats 3] [--sides SIDE ...] [--json FILE]

Sides take turns, medians count, all samples are kept. The ratio is that to the faster of llama.cpp's settings.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
for folder in ("converters", "kernels", "."):
    sys.path.insert(0, str(ROOT / folder))

from benchmarks.harness.decoder_sides import OURS, machine, opened, parser_of  # noqa: E402
from benchmarks.harness.goals import Goal, finish  # noqa: E402

TIMES_FASTER = {"avx2": 2.0, "avxvnni": 1.8, "avx512vnni": 1.8}
"""Goal of the prompt of 512 tokens by instruction set."""


def main() -> None:
    """Command line."""
    parser = parser_of((__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048])
    options = parser.parse_args()
    samples: dict[str, dict[str, list[float]]] = {
        side: {str(n): [] for n in options.tokens} for side in options.sides
    }
    with tempfile.TemporaryDirectory() as logs, opened(options, Path(logs)) as sides:
        for side in sides.values():
            side.call("prompt", n=16)  # not counted: kernels are loaded, pages come in
        for turn in range(options.repeats):
            for n in options.tokens:
                for name in options.sides if turn % 2 == 0 else reversed(options.sides):
                    seconds = sides[name].call("prompt", n=n)
                    samples[name][str(n)].append(round(seconds, 4))
                    print(f"{name:<20}{n:>6} tokens {seconds:8.2f} s {n / seconds:7.1f} tokens/s", flush=True)
    medians = {name: {n: median(found) for n, found in ones.items()} for name, ones in samples.items()}
    peers = {name: ones for name, ones in medians.items() if name != OURS}
    ratios = {
        n: min(ones[n] for ones in peers.values()) / medians[OURS][n] for n in map(str, options.tokens) if peers
    }
    facts = {
        "scenario": "prefill",
        **machine(options),
        "ours_s": medians[OURS],
        "peers_s": peers,
        "ratios": {n: round(ratio, 3) for n, ratio in ratios.items()},
        "samples_s": samples,
    }
    bound = TIMES_FASTER.get(facts["kernels"])
    goals = [
        Goal("prompt of 512 tokens, times llama.cpp", ratios["512"], bound, at_least=True)
        for _ in [1]
        if bound is not None and "512" in ratios
    ]
    finish(facts, goals, options.json)


if __name__ == "__main__":
    main()
