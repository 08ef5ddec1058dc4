"""Measure the vision part at full size, ours and its peers alternately in one run.

    python benchmarks/vision.py --json benchmarks/results/vision.json
    python benchmarks/vision.py --scenario slice --scenario picture --repeats 5 --sides ours-int8 mtmd-f16
    python benchmarks/vision.py --list

It makes random files of the real sizes if they are missing (7 GB in `--files`, once), then runs the scenarios of
`scenarios.toml`. Every side is a process of its own, stopped while another is measured, with the same number of
threads; every side has one call that is not counted, then all take turns. A peer whose package is missing is skipped
with a line that says so (`pip install '.[bench]'`).

Sides with the resampler: ours and mtmd. OpenVINO and PyTorch run the tower alone, and are compared with our tower.
`report.py` turns the result into tables. The last line is one JSON object with all samples.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in ("converters", "kernels", "."):
    sys.path.insert(0, str(ROOT / folder))

from benchmarks.harness import scenarios  # noqa: E402
from benchmarks.harness.bench import Bench, make_files  # noqa: E402
from benchmarks.harness.measures import MEASURE, Result  # noqa: E402
from benchmarks.harness.scenarios import Scenario  # noqa: E402

PACKAGES = ("llama-cpp-python", "openvino", "nncf", "torch", "numba", "llvmlite", "numpy")


def machine(threads: int) -> Result:
    """The machine and settings that the numbers depend on."""
    from edge_kernels.machine import cpu_name, isa
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
    """The scenario with the command line's changes."""
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
    from edge_kernels.machine import cpu_count

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that children end, too
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


def _without(table: Result, key: str) -> Result:
    return {name: value for name, value in table.items() if name != key and value is not None}


if __name__ == "__main__":
    main()
