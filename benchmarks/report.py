"""Results in JSON → the Markdown tables of benchmarks/README.md, and the plot of size against quality.

    python benchmarks/report.py benchmarks/results/*.json
    python benchmarks/report.py benchmarks/results/*.json --write benchmarks/README.md
    python benchmarks/report.py benchmarks/results/quality.json --plot quality.svg

`--write` replaces the text between the lines `<!-- benchmarks:begin -->` and `<!-- benchmarks:end -->`. Every row of
a result gets its row here, even if a peer is faster; every result says when, at which commit and on which machine it
was measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness.plot import plot_quality
from benchmarks.harness.tables import megabytes, number, table
from benchmarks.harness.vision_tables import scenarios

Result = dict[str, Any]

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


# --- tables -------------------------------------------------------------------------------------------------


def about_machine(result: Result) -> str:
    """The machine that the numbers were measured on, in one sentence."""
    machine = result["machine"]
    versions = machine["versions"]
    used = [f"{name} {version}" for name, version in versions.items() if version != "not installed"]
    load = machine["load_average"]
    busy = (
        f"; load average {load['start'][0]} at the start and {load['end'][0]} at the end" if load.get("start") else ""
    )
    return f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads{busy}. Versions: {', '.join(used)}."


def provenance(path: Path, result: Result) -> str:
    """One line on when and where a result was measured: date and commit from git, machine from the result itself."""
    command = ["git", "log", "-1", "--format=%cs, commit %h", "--", path.name]
    try:
        committed = subprocess.run(
            command, cwd=path.parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy without its history
        committed = ""
    return f"{committed or 'Not committed'}; {machine_name(result)}."


def machine_name(result: Result) -> str:
    """Processor, kernels and threads, where the result records them."""
    machine = result.get("machine", result)
    named = [
        machine.get("cpu", ""),
        f"kernels for {kernels}" if (kernels := machine.get("isa", machine.get("kernels"))) else "",
        f"{n} threads" if (n := machine.get("threads", machine.get("cpus"))) else "",
    ]
    if not named[0]:
        named[0] = "processor not recorded"
    return ", ".join(filter(None, named))


def vision(result: Result) -> str:
    """All scenarios of one run of vision.py."""
    return "\n\n".join([about_machine(result), *scenarios(result)])


def quality(result: Result) -> str:
    """Answers of the demo model in each pair of types."""
    measured = all("kl" in row for row in result["rows"])  # older results lack it
    rows = [
        [
            f"{row['decoder']}, {row['vision']}, {row.get('arithmetic', 'int8')}",
            number(row["bytes"] / 1e6, 1),
            f"{row['average']:.2%}",
            f"{row['agreement']:.2%}",
            number(row["loss"], 4),
            *([number(row["kl"], 5), f"{row['top1']:.2%}"] if measured else []),
        ]
        for row in result["rows"]
    ]
    heading = ["decoder, vision, arithmetic of the tower", "MB", "right answers", "same as float32", "answer loss"]
    heading += ["KL divergence, nats", "same first token"] if measured else []
    note = f"{result['samples_per_skill']} held-out samples per skill; the shipped types lose"
    reference = "float32" if result["scenario"] == "quality-demo" else "exact"
    return f"{table(heading, rows)}\n\n{note} {result['points_lost']:.2f} points against {reference}."


def quality_of_types(result: Result) -> str:
    """Size and answers of single decoder types, with what their tensors are really stored in."""
    rows = [
        [
            row["decoder"],
            ", ".join(f"{kind} {n_bytes / 1e6:.2f}" for kind, n_bytes in row["types"].items()),
            number(row["decoder_bytes"] / 1e6),
            f"{row['average']:.2%}",
            f"{row['agreement']:.2%}",
            number(row["loss"], 4),
            number(row["kl"], 5),
            f"{row['top1']:.2%}",
        ]
        for row in result["rows"]
    ]
    heading = ["decoder", "matrices, MB by type", "file, MB", "right answers", "same as float32", "answer loss"]
    heading += ["KL divergence, nats", "same first token"]
    return f"{table(heading, rows)}\n\n{result['samples_per_skill']} held-out samples per skill; vision in float32."


def conversion(result: Result) -> str:
    """Time and memory of one conversion, and of the peer's where it was measured."""
    kind = result["scenario"].removeprefix("convert-")
    sides = {f"edge-runtime, `{kind}`": result | {"seconds": result["ours_s"]}}
    if peer := result.get("peer"):
        sides |= {
            f"llama.cpp: {one['step']}": one | {"peak_anon_bytes": one["anon"], "peak_rss_bytes": one["high_water"]}
            for one in peer["steps"]
        }
        sides["llama.cpp, all steps"] = peer
    rows = [
        [
            side,
            number(of["seconds"], 0),
            megabytes(of["peak_anon_bytes"]),
            megabytes(of["peak_rss_bytes"]),
        ]
        for side, of in sides.items()
    ]
    heading = f"conversion of {megabytes(result['checkpoint_bytes'])} MB"
    return table([heading, "seconds", "peak anonymous MB", "peak RSS MB"], rows)


def goals(result: Result) -> str:
    """The goals of a benchmark of the engine."""
    rows = [
        [goal["what"], number(goal["value"]), f"{goal['bound']:g}", "met" if goal["met"] else "missed"]
        for goal in result["goals"]
    ]
    return table([result["scenario"].replace("_", " "), "measured", "goal", ""], rows)


def kernels(result: Result) -> str:
    """Kernels against NumPy."""
    ours, numpy = result["ours_s"], result["peers_s"]["numpy"]
    rows = [
        [name, number(ours[name] * 1e3), number(numpy[name] * 1e3), number(numpy[name] / ours[name])] for name in ours
    ]
    return table(["kernel", "ours ms", "NumPy ms", "ratio"], rows)


def video(result: Result) -> str:
    """A video against mtmd, which sees every frame as a picture."""
    frames, peer = result["frames"], result["mtmd"]
    rows = [
        [
            f"edge-runtime, {name}",
            number(seconds, 1),
            str(result["tokens"][name]),
            number(result["times_faster"][name]),
            number(result["times_fewer_tokens"][name]),
        ]
        for name, seconds in result["ours_s"].items()
    ]
    rows.append(
        ["llama.cpp mtmd, each frame a picture", number(result["peers_s"]["mtmd"], 1), str(result["tokens"]["mtmd"])]
        + [number(1.0)] * 2
    )
    heading = [
        f"video of {frames} frames",
        "first token, seconds",
        "prompt tokens",
        "times faster",
        "times fewer tokens",
    ]
    note = (
        f"mtmd's time is extrapolated: {peer['seconds_per_frame']:.2f} s a frame, measured on "
        f"{peer['measured_frames']} frames, times {frames}, and {peer['prefill_s']:.0f} s measured for reading the "
        "whole prompt. Ours is measured whole, with decoding the file."
    )
    return f"{about_machine(result)}\n\n{table(heading, rows)}\n\n{note}"


def calls(result: Result) -> str:
    """Prompts, or calls with some rows, through the decoder: our kernels beside llama.cpp."""
    is_prefill = result["scenario"] == "prefill"
    sides = {"edge-runtime": result["ours_s"], **result["peers_s"]}
    counts = [*result["ours_s"]]
    rows = []
    for side, seconds in sides.items():
        if is_prefill:
            cells = [number(int(n) / seconds[n], 1) for n in counts]
        else:
            cells = [f"{1e3 * seconds[n]:.0f} ({seconds[n] / seconds['1']:.2f})" for n in counts]
        rows.append([side, *cells])
    if is_prefill:
        rows.append(["times the faster llama.cpp", *(number(result["ratios"].get(n)) for n in counts)])
        heading = ["prompts, tokens/s", *(f"{n} tokens" for n in counts)]
    else:
        heading = ["a call, ms (times one row)", *(f"{n} row{'s' * (n != '1')}" for n in counts)]
    note = f"Kernels: {result['kernels']}, {result['threads']} threads, `{result['decoder']}`."
    if not is_prefill:
        rates = sorted(result["memory_GB_per_s"])
        note += (
            f" One row reads {result['read_GB_per_s']:.1f} GB/s; plain reading of memory reached "
            f"{rates[0]:.1f} to {rates[-1]:.1f} in the same run."
        )
    return f"{table(heading, rows)}\n\n{note}\n\n{goals(result)}"


def load(result: Result) -> str:
    """A server under many clients."""
    ends = ", ".join(f"{count} {end}" for end, count in result["ends"].items())
    heading = ["clients", "seconds", "ends", "requests/s", "first token, seconds: median", "p95", "memory grown, MB"]
    first = result["first_token_s"]
    row = [str(result["clients"]), number(result["seconds"], 0), ends, number(result["requests_per_s"], 1)]
    return table(heading, [[*row, number(first["median"]), number(first["p95"]), number(result["growth_mb"], 1)]])


def attacked(result: Result) -> str:
    """Clients of a server in peace, and while another client attacks it."""
    rows = []
    for side in ("peace", "attacked"):
        found, first = result[side], result[side]["first_token_s"]
        ends = ", ".join(f"{count} {end}" for end, count in found["ends"].items())
        rows.append([side, ends, number(found["requests_per_s"], 1), number(first["median"]), number(first["p95"])])
    heading = [
        f"{result['clients']} clients with pictures",
        "ends",
        "requests/s",
        "first token, seconds: median",
        "p95",
    ]
    note = (
        f"{result['attackers']} attackers at once; p95 beside them is {result['p95_ratio']:.2f} times that in peace."
    )
    return f"{table(heading, rows)}\n\n{note}"


def low_memory(result: Result) -> str:
    """Memory by stage inside a control group, and what the group counted."""
    rows = [
        [stage, *(megabytes(peak[key]) for key in ("rss", "anon", "file"))]
        for stage, peak in result["stages"].items()
    ]
    rows.append(["peak", megabytes(result["peak_rss"]), megabytes(result["peak_anon"]), ""])
    about = f"{result['limit_gb']:g} GB" if result["group"] else "no limit"
    note = (
        f"{result['slices']} slices, prompt of {result['prompt_tokens']} tokens, context of {result['n_ctx']}: first "
        f"token after {number(result['timings_s']['first_token'], 0)} s; estimated before loading: "
        f"{megabytes(result['estimated_bytes'])} MB."
    )
    if result["group"]:
        note += (
            f" The group's peak: {megabytes(result['group']['peak_bytes'])} MB; pages read again after they were "
            f"dropped: {result['group']['refaults']}."
        )
    return table([f"stage, {about}", "RSS, MB", "anonymous, MB", "of files, MB"], rows) + f"\n\n{note}"


def load_peer(result: Result) -> str:
    """A server against llama-server."""
    rows = []
    for clients, found in result["clients"].items():
        rates = [number(found[side]["requests_per_s"], 3) for side in ("ours", "llama-server")]
        rows.append([clients, *rates, number(found["ratio_of_requests"])])
    return table([f"clients of {result['model']}", "ours, requests/s", "llama-server", "times"], rows)


def render(result: Result) -> str:
    """The tables of one result.

    Raises
    ------
    ValueError
        When the result's scenario is unknown.
    """
    scenario = str(result.get("scenario"))
    known = {
        "vision": vision,
        "quality-demo": quality,
        "quality-files": quality,
        "quality-types": quality_of_types,
        "vision-kernels": kernels,
        "video": video,
    }
    known |= {
        "low-memory": low_memory,
        "load": load,
        "load_peer": load_peer,
        "attacked": attacked,
        "prefill": calls,
        "batch": calls,
    }
    known |= dict.fromkeys(("turns", "first_token", "together", "decode", "drafts"), goals)
    if scenario in known:
        return known[scenario](result)
    if scenario.startswith("convert-"):
        return conversion(result)
    raise ValueError(f"there is no table for the scenario {scenario!r}; known are {', '.join(known)} and convert-…")


def replace_between_markers(text: str, tables: str) -> str:
    """Replace what is between the two markers in `text`.

    Raises
    ------
    ValueError
        When the markers do not appear once each, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the lines {BEGIN} and {END} must be there once each, in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of the benchmarks")
    parser.add_argument("--write", type=Path, help="Markdown file to put the tables into, instead of printing them")
    parser.add_argument("--plot", type=Path, help="also draw size against quality into this file (.svg or .png)")
    options = parser.parse_args()
    parts = []
    for path in options.results:
        try:
            result = json.loads(path.read_text("utf-8"))
            parts.append(f"### {path.name}\n\n{provenance(path, result)}\n\n{render(result)}")
        except (OSError, ValueError) as error:
            raise SystemExit(f"{path}: {error}.") from None
        if options.plot and result["scenario"] == "quality-demo":
            plot_quality(result["rows"], options.plot)
    tables = "\n\n".join(parts)
    if options.write is None:
        print(tables)
        return
    try:
        changed = replace_between_markers(options.write.read_text("utf-8"), tables)
    except ValueError as error:
        raise SystemExit(f"{options.write} cannot take the tables: {error}.") from None
    options.write.write_text(changed, "utf-8")


if __name__ == "__main__":
    main()
