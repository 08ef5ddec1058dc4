"""Results of vision.py → Markdown tables: one function for each kind of scenario."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.harness.profiling import peak_of
from benchmarks.harness.tables import MISSING, megabytes, number, table

Result = dict[str, Any]

NAMES = {
    "ours-int8": "edge-runtime, int8 (default)",
    "ours-exact": "edge-runtime, float32 (`--exact`)",
    "mtmd-f16": "llama.cpp mtmd, float16 file",
    "mtmd-q8_0": "llama.cpp mtmd, Q8_0 file",
    "openvino-int8": "OpenVINO, int8 by NNCF",
    "openvino-f32": "OpenVINO, float32",
    "torch-int8": "PyTorch, dynamic int8",
    "torch-bf16": "PyTorch, bfloat16",
}
PLANTS = {
    "none": "random weights",
    "gains": "10 channels of each layer norm × 50",
    "fc2": "5 hidden units of each MLP × 30",
}


def scenarios(result: Result) -> list[str]:
    """A table for each scenario of one run, and what was left out of it."""
    parts: list[str] = []
    times = [one for one in result["results"] if one["kind"] == "time"]
    if times:
        parts.append(speed(times))
    parts += [RENDER_KIND[one["kind"]](one) for one in result["results"] if one["kind"] in RENDER_KIND]
    left_out = [*result.get("skipped", {}).items(), *result.get("failed", {}).items()]
    parts += [f"{NAMES.get(side, side)}: not measured, {reason}." for side, reason in left_out]
    return parts


def speed(times: Sequence[Result]) -> str:
    """Seconds per picture for all sides and sizes. Ratios compare like with like: the tower with the tower."""
    sides = list(dict.fromkeys(side for one in times for side in one["tower_s"] | one["samples_s"]))
    heading = ["encoding, median seconds"]
    for one in times:
        size = " × ".join(map(str, one["picture"]))
        heading += [f"{size}: tower", "and resampler", "times ours"]
    heading += ["worst cosine to float32: features", "tokens"]
    rows = []
    for side in sides:
        row = [NAMES.get(side, side)]
        for one in times:
            whole = {"ours-int8": one["ours_s"], **one["peers_s"]}
            tower = one["tower_s"]
            of = whole if whole.get(side) is not None else tower
            ours, mine = of.get("ours-int8"), of.get(side)
            ratio = mine / ours if ours and mine else None
            row += [number(tower.get(side)), number(whole.get(side)), number(ratio)]
        close: dict[str, Any] = next(
            (one["agreement"][side] for one in times if side in one.get("agreement", {})), {}
        )
        rows.append(
            row + [number(close[what]["worst"] if what in close else None, 5) for what in ("features", "tokens")]
        )
    counts = ", ".join(samples_taken(one) for one in times)
    note = (
        f"Samples per side: {counts}, taken in turns. mtmd's time includes the resampler and is compared with our "
        "whole encoding; OpenVINO and PyTorch run the tower alone and are compared with our tower. Cosines are to "
        "ours in float32 on the same random weights; our default and mtmd's Q8_0 read the Q8_0 file, the others the "
        "float16 one."
    )
    return table(heading, rows) + "\n\n" + note


def samples_taken(one: Result) -> str:
    """How many samples each side has, as a range where they differ."""
    numbers = sorted({len(of) for key in ("samples_s", "tower_samples_s") for of in one[key].values()})
    return " to ".join(str(number) for number in numbers[:: max(1, len(numbers) - 1)]) or "0"


def memory(one: Result) -> str:
    """Anonymous memory and RSS at each stage."""
    stages = {"peak_loading": "peak while loading", "loaded": "loaded", "peak": "peak", "after": "after"}
    rows = [
        [
            NAMES.get(side, side),
            *(f"{megabytes(of[stage]['anon'])} / {megabytes(of[stage]['rss'])}" for stage in stages),
            f"{of['growth_anon'] / 1e6:+.1f}",
        ]
        for side, of in one["sides"].items()
    ]
    growth = f"growth, pictures {one['settled']} to {one['pictures']}"
    heading = ["vision part, MB: anonymous / RSS", *stages.values(), growth]
    return table(heading, rows) + f"\n\nPeak during one picture of {one['slices']} slices."


def startup(one: Result) -> str:
    """A new process with compiled kernels."""
    rows = [
        [
            NAMES.get(side, side),
            number(of["start_s"]),
            number(of["load_and_repack_s"]),
            number(of["first_s"]),
            number(of["second_s"]),
            f"{of['cache_misses']:.0f}",
        ]
        for side, of in one["sides"].items()
    ]
    size = " × ".join(map(str, one["picture"]))
    heading = ["new process, seconds", "imports, opening", "load and repack", f"first {size}, with that", "second"]
    return table([*heading, "kernels compiled"], rows)


def accuracy(one: Result) -> str:
    """int8 against float32."""
    rows = [
        [
            PLANTS.get(row["plant"], row["plant"]) + (", calibrated" if row.get("calibrated") else ""),
            *(number(row[what][key], 5) for what in ("features", "tokens") for key in ("mean", "worst")),
        ]
        for row in one["rows"]
    ]
    heading = ["int8, cosine to float32", "per patch: mean", "worst", "per visual token: mean", "worst"]
    return table(heading, rows)


def profile(one: Result) -> str:
    """Share of time per operation, and each product's rate against the machine's peak."""
    parts = []
    for side, of in one["sides"].items():
        rows = []
        for row in of["operations"]:
            peak = of["peak_gops"][peak_of(row["operation"])]
            rate, share = (row["gops"], row["gops"] / peak) if row["gops"] else (None, None)
            of_peak = MISSING if share is None else f"{share:.0%}"
            rows.append([row["operation"], f"{row['share']:.1%}", number(rate, 0), of_peak])
        peaks = ", ".join(f"{name} {value:.0f}" for name, value in of["peak_gops"].items())
        heading = [f"{NAMES.get(side, side)}: {of['seconds']:.2f} s", "time", "GOP/s", "of the peak"]
        parts.append(
            f"{table(heading, rows)}\n\nPeaks of the register tiles, measured in the same run, GOP/s: {peaks}."
        )
    return "\n\n".join(parts)


RENDER_KIND: dict[str, Callable[[Result], str]] = {
    "memory": memory,
    "startup": startup,
    "accuracy": accuracy,
    "profile": profile,
}
