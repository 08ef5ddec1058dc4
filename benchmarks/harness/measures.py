"""One function per kind of scenario: measures its sides, prints a table, returns the numbers."""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.bench import MMPROJ, Bench
from benchmarks.harness.child import PAUSE_S, Child, Memory
from benchmarks.harness.planted import cosines
from benchmarks.harness.profiling import peak_of
from benchmarks.harness.scenarios import Scenario

Result = dict[str, Any]

SLOW_S, SLOW_REPEATS = 30.0, 2  # a side this slow per slice gets no more samples than this


def measure_time(bench: Bench, scenario: Scenario) -> Result:
    """Measure all sides in turns; the order rotates by one per round. Very slow sides get fewer turns."""
    width, height = scenario.picture
    children: dict[str, Child] = {}
    samples: dict[str, list[float]] = {}
    tower: dict[str, list[float]] = {}
    warm_up: dict[str, float] = {}

    def prepare(side: str) -> Child:
        child = bench.load(side)
        try:
            child.call("prepare", width=448, height=448, slices=1)
            timing = child.call("encode", width=448, height=448)  # warms up pages, caches, threads; not counted
            warm_up[side] = max(timing.values())
            progress(f"{side}: warmed up on one slice, {warm_up[side]:.2f} s")
            child.call("prepare", width=width, height=height, slices=scenario.slices)
        except BaseException:
            child.close()
            raise
        return child

    def sample(side: str) -> None:
        time.sleep(PAUSE_S)
        timing = children[side].call("encode", width=width, height=height)
        for key, of in (("seconds", samples), ("tower_s", tower)):
            if key in timing:
                of.setdefault(side, []).append(timing[key])
        progress(f"{side}: {max(timing.values()):.2f} s")

    try:
        for side in scenario.sides:
            if (child := bench.attempt(side, partial(prepare, side))) is not None:
                children[side] = child
        for number in range(scenario.repeats):
            order = list(children)
            first = number % max(1, len(order))
            for side in order[first:] + order[:first]:
                if number >= SLOW_REPEATS and warm_up[side] > SLOW_S:
                    continue
                bench.attempt(side, partial(sample, side))
        agreement = compare_outputs(bench, children, scenario) if scenario.compare_output else {}
    finally:
        for child in children.values():
            child.close()
    medians = {side: statistics.median(of) for side, of in samples.items()}
    tower_medians = {side: statistics.median(of) for side, of in tower.items()}
    print(f"{'side':16} {'tower s':>9} {'and resampler s':>16} {'times ours':>11}   cosine to float32: mean, worst")
    for side in children:
        full, alone = medians.get(side), tower_medians.get(side)
        ours = medians.get("ours-int8") if full is not None else tower_medians.get("ours-int8")
        mine = full if full is not None else alone
        ratio = f"{mine / ours:11.2f}" if ours and mine else " " * 11
        close: dict[str, Any] = agreement.get(side, {})
        cells = [f"{value:{size}.3f}" if value else " " * size for value, size in ((alone, 9), (full, 16))]
        told = ", ".join(f"{what} {close[what]['mean']:.5f} {close[what]['worst']:.5f}" for what in close)
        print(f"{side:16} {' '.join(cells)} {ratio}   {told}")
    return {
        "ours_s": medians.get("ours-int8"),
        "peers_s": {side: value for side, value in medians.items() if side != "ours-int8"},
        "tower_s": tower_medians,
        "samples_s": samples,
        "tower_samples_s": tower,
        "agreement": agreement,
    }


def compare_outputs(bench: Bench, children: dict[str, Child], scenario: Scenario) -> dict[str, Any]:
    """Cosines of each side's first slice to ours in float32: features and visual tokens, where it returns them."""
    width, height = scenario.picture
    outputs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def fetch(child: Child) -> dict[str, Any]:
            path = Path(folder) / "output.npz"
            child.call("output", width=width, height=height, path=str(path))
            with np.load(path) as arrays:
                return dict(arrays)

        for side, child in children.items():
            if (output := bench.attempt(side, partial(fetch, child))) is not None:
                outputs[side] = output
    reference = outputs.get("ours-exact")
    if reference is None:
        return {}
    agreement: dict[str, Any] = {}
    for side, output in outputs.items():
        for what, rows in output.items():
            found = cosines(rows, reference[what])
            agreement.setdefault(side, {})[what] = {"mean": float(found.mean()), "worst": float(found.min())}
    return agreement


def measure_memory(bench: Bench, scenario: Scenario) -> Result:
    """Measure one side after the other: memory at each stage, in bytes."""
    width, height = scenario.picture
    rows: dict[str, Any] = {}

    def stages(side: str) -> Result:
        with bench.start(side) as child:
            started = child.memory()
            _, peak_loading = child.watch("load")
            loaded = child.memory()
            child.call("prepare", width=width, height=height, slices=scenario.slices)

            def settled_memory() -> Memory:
                if side.startswith("ours"):
                    child.call("rest")  # as the engine does when idle
                return child.memory()

            _, peak = child.watch("encode", width=width, height=height)
            after = settled_memory()
            settled = min(scenario.growth_settled, scenario.growth_pictures)
            child.call("many", count=settled, first=0)
            before = settled_memory()
            samples = [before]
            for first in range(settled, scenario.growth_pictures, 10):
                child.call("many", count=min(10, scenario.growth_pictures - first), first=first)
                samples.append(settled_memory())
            moments = {
                "started": started,
                "peak_loading": peak_loading,
                "loaded": loaded,
                "peak": peak,
                "after": after,
                "settled": before,
                "end": samples[-1],
            }
            return {
                **{name: {key: getattr(m, key) for key in ("rss", "anon")} for name, m in moments.items()},
                "growth_anon": samples[-1].anon - before.anon,
                "anon_samples": [m.anon for m in samples],
            }

    heading = f"after {scenario.growth_settled} to {scenario.growth_pictures} pictures"
    print(f"MB, anonymous/RSS {'loading, peak':>17} {'loaded':>13} {'peak':>13} {'after':>13}   growth, {heading}")
    for side in scenario.sides:
        if (row := bench.attempt(side, partial(stages, side))) is not None:
            rows[side] = row
            cells = [
                f"{row[m]['anon'] / 1e6:6.0f}/{row[m]['rss'] / 1e6:6.0f}"
                for m in ("peak_loading", "loaded", "peak", "after")
            ]
            print(f"{side:22} {' '.join(cells)}   {row['growth_anon'] / 1e6:+.1f}", flush=True)
    return {
        "sides": rows,
        "pictures": scenario.growth_pictures,
        "settled": scenario.growth_settled,
        "sample_period_s": 0.02,
    }


def measure_startup(bench: Bench, scenario: Scenario) -> Result:
    """Measure new processes after one that compiled everything: the first picture against the second."""
    width, height = scenario.picture
    rows: dict[str, list[Result]] = {}

    def compile_all(side: str) -> None:
        with bench.load(side) as child:
            child.call("prepare", width=448, height=448, slices=1)
            child.call("encode", width=448, height=448)

    def once(side: str) -> Result:
        start = time.perf_counter()
        with bench.start(side) as child:
            imported_s = time.perf_counter() - start
            loading = child.call("load")
            child.call("prepare", width=width, height=height, slices=scenario.slices)
            first, second = (child.call("encode", width=width, height=height)["seconds"] for _ in range(2))
            kernels = child.call("since_start")
        repack = loading["load_and_repack_s"]
        return {
            "start_s": imported_s + loading["open_s"],
            "load_and_repack_s": repack,
            "first_encode_s": first,
            "first_s": repack + first,
            "second_s": second,
            "cache_hits": kernels["hits"],
            "cache_misses": kernels["misses"],
        }

    print(
        f"{'side':12} {'start, open':>12} {'load, repack':>13} {'first':>8} {'second':>8}   kernels cached, compiled"
    )
    for side in scenario.sides:
        bench.attempt(side, partial(compile_all, side))
        for _ in range(scenario.repeats):
            if (row := bench.attempt(side, partial(once, side))) is not None:
                rows.setdefault(side, []).append(row)
                print(
                    f"{side:12} {row['start_s']:12.2f} {row['load_and_repack_s']:13.2f} {row['first_s']:8.2f} "
                    f"{row['second_s']:8.2f}   {row['cache_hits']}, {row['cache_misses']}",
                    flush=True,
                )
    medians = {
        side: {key: statistics.median(row[key] for row in of) for key in of[0]} for side, of in rows.items() if of
    }
    return {"sides": medians, "samples": rows}


def measure_accuracy(bench: Bench, scenario: Scenario) -> Result:
    """Compare both arithmetics on the same file, unchanged and with planted weights."""
    width, height = scenario.picture
    rows: list[Result] = []
    source = str(bench.files / "f16" / MMPROJ["f16"])

    def output(side: str, plant: str, path: Path, calibrated: bool = False) -> dict[str, Any]:
        with bench.load(side, plant=plant, mmproj=source, calibrated=calibrated) as child:
            child.call("prepare", width=width, height=height, slices=scenario.slices)
            child.call("output", width=width, height=height, path=str(path))
        with np.load(path) as arrays:
            return dict(arrays)

    print(f"{'planted':10} {'side':22} {'per patch: mean':>16} {'worst':>9} {'per token: mean':>16} {'worst':>9}")
    plain: dict[str, Any] | None = None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "output.npz"
        for plant in scenario.plants or ["none"]:
            exact = bench.attempt("ours-exact", partial(output, "ours-exact", plant, path))
            if exact is None:
                continue
            plain = exact if plant == "none" else plain
            ways = [False, True] if plant in (scenario.calibrated or ()) else [False]
            for side, calibrated in itertools.product(scenario.sides, ways):
                name = f"{side}, calibrated" if calibrated else side
                found = bench.attempt(name, partial(output, side, plant, path, calibrated))
                if found is None:
                    continue
                row: Result = {"plant": plant, "side": side, "calibrated": calibrated}
                for what in ("features", "tokens"):
                    all_ = cosines(found[what], exact[what])
                    row[what] = {"mean": float(all_.mean()), "worst": float(all_.min()), "rows": len(all_)}
                if plain is not None:
                    # How much planting changes float32 itself: gains not at all, fc2 a little.
                    row["float32_to_unplanted"] = float(cosines(exact["features"], plain["features"]).min())
                rows.append(row)
                cells = [f"{row[what][key]:.5f}" for what in ("features", "tokens") for key in ("mean", "worst")]
                print(f"{plant:10} {name:22} {cells[0]:>16} {cells[1]:>9} {cells[2]:>16} {cells[3]:>9}", flush=True)
    return {"rows": rows, "source": MMPROJ["f16"]}


def measure_profile(bench: Bench, scenario: Scenario) -> Result:
    """Measure where the time of one picture goes."""
    width, height = scenario.picture
    rows: dict[str, Any] = {}

    def once(side: str) -> Result:
        with bench.load(side) as child:
            child.call("prepare", width=width, height=height, slices=scenario.slices)
            result: Result = child.call("profile", width=width, height=height, repeats=scenario.repeats)
            return result

    for side in scenario.sides:
        if (result := bench.attempt(side, partial(once, side))) is None:
            continue
        rows[side] = result
        peaks = ", ".join(f"{name} {rate:.0f}" for name, rate in result["peak_gops"].items())
        print(f"{side}: {result['seconds']:.2f} s; peak of the register tiles in GOP/s: {peaks}")
        for row in result["operations"]:
            peak = result["peak_gops"][peak_of(row["operation"])]
            rate = f"{row['gops']:9.1f} GOP/s {row['gops'] / peak:6.1%} of the peak" if row["gops"] else ""
            print(f"  {row['operation']:44} {row['seconds']:8.3f} s {row['share']:6.1%} {rate}".rstrip(), flush=True)
    return {"sides": rows}


MEASURE: dict[str, Callable[[Bench, Scenario], Result]] = {
    "time": measure_time,
    "memory": measure_memory,
    "startup": measure_startup,
    "accuracy": measure_accuracy,
    "profile": measure_profile,
}


def progress(text: str) -> None:
    """Report progress, apart from the tables."""
    print(f"  {text}", file=sys.stderr, flush=True)
