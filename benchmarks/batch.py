"""Calls with 1 to 16 rows through the decoder: what more rows cost, and what of the memory's rate one row reaches.

    python benchmarks/batch.py DECODER.gguf [--rows 1 2 4 8 16] [--calls 5] [--repeats 3] [--json FILE]

Every row belongs to a sequence of its own, as in a server that answers several requests. Sides take turns, medians
count, all samples are kept. The memory's rate is measured in the same run, by the threads that compute.
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

MOST_TIMES = {8: 1.6, 16: 2.2}
"""What so many rows may cost, in times of one."""
LEAST_OF_MEMORY = 80.0
"""Per cent of the rate at which memory is read."""


def main() -> None:
    """Command line."""
    from edge_runtime.weights.gguf_file import GGUFFile

    parser = parser_of((__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--calls", type=int, default=5, help="calls in a turn")
    options = parser.parse_args()
    tensors = GGUFFile(options.decoder).tensors
    read = sum(
        t.n_bytes for name, t in tensors.items() if name != "token_embd.weight" or "output.weight" not in tensors
    )
    samples: dict[str, dict[str, list[float]]] = {side: {str(n): [] for n in options.rows} for side in options.sides}
    rates = []
    with tempfile.TemporaryDirectory() as logs, opened(options, Path(logs)) as sides:
        for side in sides.values():
            side.call("rows", n=1, repeats=1)  # not counted
        for turn in range(options.repeats):
            rates.append(sides[options.sides[0]].call("bandwidth"))
            for n in options.rows:
                for name in options.sides if turn % 2 == 0 else reversed(options.sides):
                    found = sides[name].call("rows", n=n, repeats=options.calls)
                    samples[name][str(n)] += [round(seconds, 5) for seconds in found]
                    print(f"{name:<20}{n:>3} rows {1000 * median(found):8.1f} ms a call", flush=True)
    medians = {name: {n: median(found) for n, found in ones.items()} for name, ones in samples.items()}
    ours, peers = medians[OURS], {name: ones for name, ones in medians.items() if name != OURS}
    share = 100 * read / ours["1"] / 1e9 / median(rates)
    facts = {
        "scenario": "batch",
        **machine(options),
        "ours_s": ours,
        "peers_s": peers,
        "times_one_row": {
            name: {n: round(seconds / ones["1"], 3) for n, seconds in ones.items()} for name, ones in medians.items()
        },
        "read_GB_per_s": round(read / ours["1"] / 1e9, 2),
        "memory_GB_per_s": [round(rate, 2) for rate in rates],
        "samples_s": samples,
    }
    goals = [
        Goal(f"{n} rows, times one", ours[str(n)] / ours["1"], bound)
        for n, bound in MOST_TIMES.items()
        if str(n) in ours
    ]
    goals.append(Goal("one row", share, LEAST_OF_MEMORY, " % of the memory's rate", at_least=True))
    if peers:
        best = min(ones["1"] for ones in peers.values())
        goals.append(Goal("one row, times llama.cpp's rate", best / ours["1"], 1.0, at_least=True))
    finish(facts, goals, options.json)


if __name__ == "__main__":
    main()
