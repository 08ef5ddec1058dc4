"""Time the vision kernels at the model's shapes, against NumPy.

    python benchmarks/kernels.py [--repeats 5] [--threads N]

Each case runs both sides alternately in one process on the same number of threads. Before every sample come a pause,
since the other side's threads spin for a while after their work and would take time from this one, and a call that is
not counted (compilation, page faults, sleeping threads). The peer of `linear` is NumPy's matrix product (OpenBLAS
sgemm) without bias and activation, which favours it; the others' peer is the NumPy reference. The int8 product,
including the quantisation of its rows, has our float32 product as a second peer, in the same turns.
Shapes: one slice of 1024 patches of SigLIP so400m, and the resampler with 4096 columns.

The last line is one JSON object: `scenario`, `ours_s` and `peers_s` (medians, seconds, by case), and all
samples.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

PAUSE_S = 0.5  # OpenBLAS threads keep spinning for tenths of a second


def sample(run: Callable[[], Any]) -> float:
    """Time one call, after a pause for the other side's threads and a call that wakes our own."""
    time.sleep(PAUSE_S)
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cases() -> dict[str, tuple[Callable[[], Any], Callable[[], Any], float, Callable[[], Any] | None]]:
    """Case → (ours, NumPy, operations in units of 1e9, our float32 where ours is int8)."""
    import numpy as np

    from edge_kernels.attention.float32 import attention
    from edge_kernels.linear.float32 import linear, pack_weight
    from edge_kernels.linear.int8 import linear_int8
    from edge_kernels.linear.int8_weights import pack_weight_int8
    from edge_kernels.reference import operations as reference
    from edge_kernels.rows.norm import layer_norm

    random = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return random.standard_normal(shape, np.float32)

    table: dict[str, tuple[Callable[[], Any], Callable[[], Any], float, Callable[[], Any] | None]] = {}

    def add_linear(name: str, m: int, n: int, k: int, *, gelu: bool = False, residual: bool = False) -> None:
        x, weight, bias = normal(m, k), normal(n, k), normal(n)
        packed = pack_weight(weight)
        rest = normal(m, n) if residual else None
        operations = 2 * m * n * k / 1e9

        def ours() -> Any:
            return linear(x, packed, bias, gelu=gelu, residual=rest)

        def peer() -> Any:
            return x @ weight.T

        packed_int8 = pack_weight_int8(weight)
        table[f"{name} {m}x{n}x{k}"] = (ours, peer, operations, None)
        table[f"int8 {name} {m}x{n}x{k}"] = (
            lambda: linear_int8(x, packed_int8, bias, gelu=gelu, residual=rest),
            peer,
            operations,
            ours,
        )

    def add_attention(name: str, n_q: int, n_kv: int, heads: int, d: int) -> None:
        q, k, v = normal(n_q, heads * d), normal(n_kv, heads * d), normal(n_kv, heads * d)
        arguments = (q, k, v, heads, d**-0.5, np.array([0, n_q]), np.array([0, n_kv]))
        table[f"{name} {n_q}x{n_kv}, {heads} heads of {d}"] = (
            lambda: attention(*arguments),
            lambda: reference.attention(*arguments),
            4 * n_q * n_kv * heads * d / 1e9,
            None,
        )

    add_linear("q, k, v", 1024, 1152, 1152)
    add_linear("out + residual", 1024, 1152, 1152, residual=True)
    add_linear("fc1 + GELU", 1024, 4304, 1152, gelu=True)
    add_linear("fc2 + residual", 1024, 1152, 4304, residual=True)
    add_linear("resampler k, v", 1024, 4096, 4096)
    add_linear("resampler queries", 64, 4096, 4096)
    add_attention("SigLIP attention", 1024, 1024, 16, 72)
    add_attention("resampler attention", 64, 1024, 32, 128)
    x, gain, bias = normal(1024, 1152), normal(1152), normal(1152)
    table["layer norm 1024x1152"] = (
        lambda: layer_norm(x, gain, bias, 1e-6),
        lambda: reference.layer_norm(x, gain, bias, 1e-6),
        8 * x.size / 1e9,
        None,
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=5, help="samples per case and side (default 5)")
    parser.add_argument("--threads", type=int, help="threads of both sides (default: physical cores allowed)")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        os.environ["OPENBLAS_NUM_THREADS"] = str(arguments.threads)  # NumPy, loaded below, reads it

    import numpy as np

    from edge_kernels import machine, threads
    from edge_kernels.simd.ir import TILE

    threads.set_threads(arguments.threads)
    samples: dict[str, dict[str, list[float]]] = {"ours": {}, "numpy": {}, "float32": {}}
    print(f"{machine.cpu_name()}, {machine.isa()}, {threads.thread_count()} threads, {TILE}")
    print(f"{'case':44} {'ours ms':>10} {'GOP/s':>9} {'numpy ms':>10} {'GOP/s':>9} {'ratio':>7} {'to float32':>11}")
    for name, (ours, peer, operations, float32) in cases().items():
        sides = {"ours": ours, "numpy": peer} | ({"float32": float32} if float32 else {})
        for _ in range(arguments.repeats):
            for side, run in sides.items():
                samples[side].setdefault(name, []).append(sample(run))
        a, b = (statistics.median(samples[side][name]) for side in ("ours", "numpy"))
        rates = f"{a * 1e3:10.2f} {operations / a:9.1f} {b * 1e3:10.2f} {operations / b:9.1f} {b / a:7.2f}"
        to_float32 = f" {statistics.median(samples['float32'][name]) / a:11.2f}" if float32 else ""
        print(f"{name:44} {rates}{to_float32}")

    medians = {side: {name: statistics.median(all_) for name, all_ in of.items()} for side, of in samples.items()}
    summary = {
        "scenario": "vision-kernels",
        "ours_s": medians["ours"],
        "peers_s": {"numpy": medians["numpy"], "float32": medians["float32"]},
        "samples_s": samples,
        "threads": threads.thread_count(),
        "cpu": machine.cpu_name(),
        "isa": machine.isa(),
        "tile": TILE._asdict(),
        "versions": {"numpy": np.__version__, "python": sys.version.split()[0]},
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
