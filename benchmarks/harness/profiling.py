"""Time per operation inside one encoding: wraps the public functions of `edge_kernels` while it runs.

The time of a wrapped function called by another one counts only for itself (a product that quantises its rows first
gives two entries). The functions are not listed here, so new kernels are found as well.
"""

from __future__ import annotations

import inspect
import statistics
import sys
import time
from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from types import FunctionType
from typing import Any

Rows = dict[str, tuple[float, float]]
"""Label → seconds, operations in units of 1e9."""

PLUMBING = ("arrays", "compile", "machine", "reference", "simd", "threads")
"""Modules and folders of `edge_kernels` whose functions are not operations."""

PRODUCTS = {
    (588, 1152): "patches",
    (1152, 1152): "attention out",
    (1152, 3456): "q, k, v",
    (1152, 4304): "fc1",
    (4304, 1152): "fc2",
    (1152, 4096): "resampler kv",
    (4096, 4096): "resampler",
}
"""Names of the full-size model's products by (inputs, outputs)."""


class Profile:
    """While entered, adds up the time of every operation by label.

    Functions are found in the modules that are loaded when it is entered; references taken before stay unwrapped. So
    enter it after a first encoding and before the weights are packed.
    """

    def __init__(self) -> None:
        self._rows: dict[str, list[float]] = {}
        self._inner: list[float] = []
        self._put_back: list[tuple[Any, str, Any]] = []

    def clear(self) -> None:
        """Reset the sums."""
        self._rows.clear()

    def rows(self) -> Rows:
        """The sums so far."""
        return {label: (seconds, work) for label, (seconds, work) in self._rows.items()}

    def __enter__(self) -> Profile:
        wrapped = {function: self._wrap(function) for function in _operations()}
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] not in ("edge_kernels", "edge_runtime"):
                continue
            for attribute, value in list(vars(module).items()):
                if isinstance(value, FunctionType) and value in wrapped:
                    self._put_back.append((module, attribute, value))
                    setattr(module, attribute, wrapped[value])
        return self

    def __exit__(self, *_: object) -> None:
        for module, attribute, value in self._put_back:
            setattr(module, attribute, value)
        self._put_back.clear()

    def _wrap(self, function: FunctionType) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                own = seconds - self._inner.pop()
                if self._inner:
                    self._inner[-1] += seconds
                label, work = describe(function.__name__, signature.bind(*args, **kwargs).arguments)
                row = self._rows.setdefault(label, [0.0, 0.0])
                row[0] += own
                row[1] += work

        return timed


def _operations() -> set[FunctionType]:
    found: set[FunctionType] = set()
    for name, module in list(sys.modules.items()):
        package, _, short = name.partition(".")
        if package == "edge_kernels" and short and short.partition(".")[0] not in PLUMBING:
            found |= {
                value
                for key, value in vars(module).items()
                if isinstance(value, FunctionType) and value.__module__ == name and not key.startswith("_")
            }
    return found


def describe(name: str, arguments: dict[str, Any]) -> tuple[str, float]:
    """Label of one call, and its multiplications and additions in units of 1e9 (0 where they say nothing)."""
    weight: Any = arguments.get("weight")
    first: Any = next(iter(arguments.values()), None)
    if hasattr(weight, "n") and hasattr(weight, "k"):
        m = first.m if hasattr(first, "m") else len(first)
        after = ", GELU" if arguments.get("gelu") else ""
        after += ", residual" if arguments.get("residual") is not None else ""
        # patch_embed's own time is gathering positions: the product inside has its own entry.
        work = 0.0 if name == "patch_embed" else 2.0 * m * weight.n * weight.k / 1e9
        product = PRODUCTS.get((weight.k, weight.n), "")
        return f"{product}{': ' if product else ''}{name} {weight.k} → {weight.n}{after}", work
    if (packed := arguments.get("packed")) is not None:  # products and attention in one
        starts, width = arguments["offsets"], packed.heads * packed.d
        pairs = sum((stop - start) ** 2 for start, stop in pairwise(starts))
        work = (6.0 * first.m * packed.weight.k * width + 4.0 * pairs * width) / 1e9
        return f"q, k, v: {name} {packed.weight.k} → {packed.heads} heads of {packed.d}", work
    if {"q", "q_offsets", "kv_offsets"} <= set(arguments):
        q, starts, ends = arguments["q"], arguments["q_offsets"], arguments["kv_offsets"]
        pairs = sum((starts[s + 1] - starts[s]) * (ends[s + 1] - ends[s]) for s in range(len(starts) - 1))
        heads = arguments["heads"]
        return f"{name}, {heads} heads of {q.shape[1] // heads}", 4.0 * pairs * q.shape[1] / 1e9
    shape = getattr(first, "shape", None)
    return f"{name} of {shape[-1]}" if shape else name, 0.0


def peak_of(operation: str) -> str:
    """Peak that an operation is compared with, "int8" or "float32"; bfloat16's is half of int8's."""
    return "int8" if any(kind in operation for kind in ("int8", "int16", "bf16", "self_attention")) else "float32"


def summarise(runs: list[tuple[float, Rows]], least_share: float = 0.002) -> list[dict[str, Any]]:
    """Median seconds, share and rate per label, largest first; the last row is small labels and non-kernel time."""
    total = statistics.median(seconds for seconds, _ in runs)
    labels = {label for _, rows in runs for label in rows}
    medians = {label: statistics.median(rows.get(label, (0.0, 0.0))[0] for _, rows in runs) for label in labels}
    work = {label: max(rows.get(label, (0.0, 0.0))[1] for _, rows in runs) for label in labels}
    table = [
        {
            "operation": label,
            "seconds": seconds,
            "share": seconds / total,
            "gops": work[label] / seconds if work[label] else None,
        }
        for label, seconds in sorted(medians.items(), key=lambda item: -item[1])
        if seconds >= least_share * total
    ]
    rest = total - sum(float(row["seconds"] or 0) for row in table)
    return [*table, {"operation": "everything else", "seconds": rest, "share": rest / total, "gops": None}]
