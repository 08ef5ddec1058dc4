"""Measure the vision part at full size, ours and its peers alternately in one run.

    python benchmarks/vision.py --json benchmarks/results/vision.json
    python benchmarks/vision.py --scenario slice --scenario picture --repeats 5 --sides ours-int8 mtmd-f16
    python benchmarks/vision.py --list

Makes the random files of the real sizes where they are absent (7 GB in `--files`, once), then runs the scenarios of
`scenarios.toml`. Every side is a process of its own, stopped while another is measured, with the same number of
threads; every side has one call that is not counted, then all take turns. A peer whose package is missing is left
out with a line that says so (`pip install '.[bench]'`).

Sides with the resampler: ours and mtmd. OpenVINO and PyTorch run the tower alone, and are compared with our tower.
`report.py` makes tables of the result. The last line is one JSON object with all samples.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in ("converters", "kernels", "."):
    sys.path.insert(0, str(ROOT / folder))

import numpy as np  # noqa: E402

from benchmarks.sides import scenarios  # noqa: E402
from benchmarks.sides.child import PAUSE_S, Child, SideError, Skipped, environment  # noqa: E402
from benchmarks.sides.planted import cosines  # noqa: E402
from benchmarks.sides.profiling import peak_of  # noqa: E402
from benchmarks.sides.scenarios import Scenario  # noqa: E402

Result = dict[str, Any]

MMPROJ = {"f16": "mmproj-model-f16.gguf", "q8_0": "mmproj-model-q8_0.gguf"}
DECODER = "ggml-model-Q4_K_M.gguf"
CHECKPOINT_GB = 3.9  # one decoder layer: mtmd wants a decoder for its vocabulary
SLOW_S, SLOW_REPEATS = 30.0, 2  # a side that takes so long for a slice has no more samples than this
PACKAGES = ("llama-cpp-python", "openvino", "nncf", "torch", "numba", "llvmlite", "numpy")


# --- files --------------------------------------------------------------------------------------------------


def make_files(folder: Path, tokenizer: Path | None) -> None:
    """Make the random checkpoint and its conversions unless they are there."""
    missing = [kind for kind in MMPROJ if not (folder / kind / MMPROJ[kind]).exists()]
    if not missing:
        return
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "model.safetensors.index.json").exists():
        print(f"Making a random checkpoint of {CHECKPOINT_GB} GB in {checkpoint}.", flush=True)
        given = ["--tokenizer", str(tokenizer)] if tokenizer else []
        _run(["benchmarks/make_checkpoint.py", str(checkpoint), "--gb", str(CHECKPOINT_GB), *given])
    for kind in missing:
        print(f"Converting it with --vision-type {kind}.", flush=True)
        command = ["-m", "edge_runtime", "convert", str(checkpoint), "-o", str(folder / kind)]
        _run([*command, "--type", "q4_k_m", "--vision-type", kind, "--force"])


def _run(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(None), stdout=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed with exit code {done.returncode}.")


# --- sides --------------------------------------------------------------------------------------------------


class Bench:
    """Makes children for sides, and remembers which cannot run here."""

    def __init__(self, files: Path, threads: int) -> None:
        self.files, self.threads = files, threads
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.facts: dict[str, Any] = {}
        """What each side told when it was loaded."""

    def _spec(self, side: str) -> tuple[str, dict[str, Any]]:
        peer, _, kind = side.partition("-")
        f16 = str(self.files / "f16" / MMPROJ["f16"])
        shipped = str(self.files / "q8_0" / MMPROJ["q8_0"])
        common = {"threads": self.threads}
        if peer == "ours":
            exact = kind == "exact"
            return "ours", common | {"mmproj": f16 if exact else shipped, "exact": exact}
        if peer == "mtmd":
            decoder = str(self.files / kind / DECODER)
            return "mtmd", common | {"mmproj": str(self.files / kind / MMPROJ[kind]), "decoder": decoder}
        return f"{peer}_tower", common | {"mmproj": f16, "precision": kind, "folder": str(self.files)}

    def start(self, side: str, **options: Any) -> Child:
        """Start a side without loading anything."""
        module, given = self._spec(side)
        child = Child(f"benchmarks.sides.{module}", given | options, self.files / "logs" / f"{side}.log")
        if module == "openvino_tower":
            try:
                child.call("make")
            except BaseException:
                child.close()
                raise
            # What quantising took in memory and threads is no part of the side.
            child.close()
            child = Child(f"benchmarks.sides.{module}", given | options, self.files / "logs" / f"{side}.log")
        return child

    def load(self, side: str, **options: Any) -> Child:
        """Start a side and load its weights."""
        child = self.start(side, **options)
        try:
            self.facts[side] = child.call("load")
        except BaseException:
            child.close()
            raise
        return child

    def attempt(self, side: str, run: Callable[[], Any]) -> Any:
        """Result of `run`, or None where the side is missing or breaks, which is told once."""
        if side in self.skipped or side in self.failed:
            return None
        try:
            return run()
        except Skipped as reason:
            self.skipped[side] = str(reason)
            print(f"{side}: left out, {reason}.", flush=True)
        except SideError as error:
            self.failed[side] = str(error)
            print(f"{side}: FAILED, {error}. See {self.files / 'logs' / f'{side}.log'}.", flush=True)
        return None


# --- kinds of scenarios -------------------------------------------------------------------------------------


def measure_time(bench: Bench, scenario: Scenario) -> Result:
    """All sides in turns; the order moves on by one in each round. Very slow sides have fewer turns."""
    width, height = scenario.picture
    children: dict[str, Child] = {}
    samples: dict[str, list[float]] = {}
    tower: dict[str, list[float]] = {}
    warm_up: dict[str, float] = {}

    def prepare(side: str) -> Child:
        child = bench.load(side)
        try:
            child.call("prepare", width=448, height=448, slices=1)
            timing = child.call("encode", width=448, height=448)  # pages, caches, threads; not counted
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
    """Cosines of each side's first slice to ours in float32: features and visual tokens, as far as it has them."""
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
    """One side after the other: memory at each stage, in bytes."""
    width, height = scenario.picture
    rows: dict[str, Any] = {}

    def stages(side: str) -> Result:
        with bench.start(side) as child:
            started = child.memory()
            _, peak_loading = child.watch("load")
            loaded = child.memory()
            child.call("prepare", width=width, height=height, slices=scenario.slices)
            _, peak = child.watch("encode", width=width, height=height)
            after = child.memory()
            settled = min(scenario.growth_settled, scenario.growth_pictures)
            child.call("many", count=settled, first=0)
            before = child.memory()
            samples = [before]
            for first in range(settled, scenario.growth_pictures, 10):
                child.call("many", count=min(10, scenario.growth_pictures - first), first=first)
                samples.append(child.memory())
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
    """New processes after one that has compiled everything: the first picture against the second."""
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
    """The same file in both arithmetics, as it is and with something planted."""
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
                    # How far planting moves float32 itself: gains nowhere, fc2 a little.
                    row["float32_to_unplanted"] = float(cosines(exact["features"], plain["features"]).min())
                rows.append(row)
                cells = [f"{row[what][key]:.5f}" for what in ("features", "tokens") for key in ("mean", "worst")]
                print(f"{plant:10} {name:22} {cells[0]:>16} {cells[1]:>9} {cells[2]:>16} {cells[3]:>9}", flush=True)
    return {"rows": rows, "source": MMPROJ["f16"]}


def measure_profile(bench: Bench, scenario: Scenario) -> Result:
    """Where the time of one picture goes."""
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
    """Tell what goes on, beside the tables."""
    print(f"  {text}", file=sys.stderr, flush=True)


# --- command line -------------------------------------------------------------------------------------------


def machine(threads: int) -> Result:
    """What the numbers depend on."""
    from edge_kernels.compile import cpu_name, isa
    from edge_runtime import __version__

    versions = {"edge-runtime": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": _model_name() or cpu_name(),
        "llvm_cpu": cpu_name(),
        "isa": isa(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def _model_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def load_average() -> list[float] | None:
    """Load average over 1, 5 and 15 minutes, where the system has one."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def adjusted(scenario: Scenario, options: argparse.Namespace) -> Scenario:
    """The scenario as the command line wants it."""
    if options.repeats is not None:
        scenario = replace(scenario, repeats=options.repeats)
    if options.sides:
        scenario = replace(scenario, sides=[side for side in scenario.sides if side in options.sides])
        more = [side for side in options.sides if side not in scenario.sides]
        scenario = replace(scenario, sides=scenario.sides + (more if scenario.kind in ("time", "memory") else []))
    if options.pictures is not None:
        settled = min(scenario.growth_settled, options.pictures // 2)
        scenario = replace(scenario, growth_pictures=options.pictures, growth_settled=settled)
    return scenario


def parse() -> tuple[argparse.Namespace, list[Scenario]]:
    known = scenarios.read_scenarios(scenarios.FILE.read_text("utf-8"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--scenario", action="extend", nargs="+", choices=list(known), help="default: all")
    parser.add_argument("--sides", nargs="+", choices=scenarios.SIDES, help="default: those of the scenario")
    parser.add_argument("--repeats", type=int, help="samples per side (default: the scenario's)")
    parser.add_argument("--pictures", type=int, help="pictures of the memory scenario (default: its own)")
    parser.add_argument("--threads", type=int, help="threads of every side (default: physical cores allowed)")
    parser.add_argument("--files", type=Path, default=ROOT / "build" / "bench", help="folder of the random files")
    parser.add_argument("--tokenizer", type=Path, help="folder with the real tokenizer's files, for new random files")
    parser.add_argument("--json", type=Path, help="also write the result to this file, after every scenario")
    parser.add_argument("--list", action="store_true", help="tell the scenarios and leave")
    options = parser.parse_args()
    if options.list:
        for scenario in known.values():
            print(f"{scenario.name:10} {scenario.about}; {', '.join(scenario.sides)}")
        raise SystemExit
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; expected at least 1")
    return options, [adjusted(known[name], options) for name in options.scenario or known]


def main() -> None:
    options, chosen = parse()
    from edge_kernels.compile import cpu_count

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that children are ended, too
    files = options.files.resolve()
    make_files(files, options.tokenizer)
    threads = options.threads or cpu_count()
    bench = Bench(files, threads)
    summary: Result = {"scenario": "vision", "machine": machine(threads), "results": []}
    summary["machine"]["started"] = datetime.now(UTC).isoformat(timespec="seconds")
    summary["machine"]["load_average"] = {"start": load_average()}
    told = summary["machine"]
    print(f"{told['cpu']}, {told['isa']}, {threads} threads, load average {told['load_average']['start']}")
    for scenario in chosen:
        print(f"\n{scenario.name}: {scenario.about}", flush=True)
        result = MEASURE[scenario.kind](bench, scenario)
        summary["results"].append({"scenario": scenario.name, **_without(asdict(scenario), "name"), **result})
        summary |= {"skipped": bench.skipped, "failed": bench.failed, "loading": bench.facts}
        summary["machine"]["load_average"]["end"] = load_average()
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    print(json.dumps(summary))


def _without(table: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name != key and value is not None}


if __name__ == "__main__":
    main()
