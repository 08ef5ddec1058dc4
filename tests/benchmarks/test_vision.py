"""The vision benchmark's own parts, without peers: scenarios, children, memory, what is planted, tables, plot."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from benchmarks import report
from benchmarks.harness import scenarios
from benchmarks.harness.child import CAN_STOP, Child, Peak, SideError, Skipped
from benchmarks.harness.pictures import cut, picture, shapes
from benchmarks.harness.planted import PLANTS, cosines, planted
from benchmarks.harness.plot import _free_box
from benchmarks.harness.profiling import Profile, describe, peak_of, summarise
from edge_kernels.linear import int8 as linear_int8
from edge_runtime.vision import encoder
from edge_runtime.vision.encoder import ImageEncoder
from edge_runtime.weights.config import SlicingConfig, slicing_config
from edge_runtime.weights.gguf_file import GGUFFile

ROOT = Path(__file__).resolve().parents[2]
MEGABYTES = 200
CASE = 'kind = "time"\nabout = "x"\npicture = [448, 448]\nslices = 1\nsides = ["ours-int8"]\n'


# --- scenarios ----------------------------------------------------------------------------------------------


def test_the_scenario_file_is_sound() -> None:
    found = scenarios.read_scenarios(scenarios.FILE.read_text("utf-8"))
    assert list(found) == ["slice", "picture", "memory", "startup", "accuracy", "profile"]
    assert {scenario.kind for scenario in found.values()} == set(scenarios.KINDS)
    assert found["picture"].slices == 10
    assert set(found["accuracy"].plants or ()) == set(PLANTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a", "no TOML"),
        ("a = 1", "expected a table"),
        ('[a]\nkind = "time"', "lacks the key"),
        (f"[a]\n{CASE}colour = 1", "unknown key colour"),
        (f"[a]\n{CASE}repeats = true", "repeats is True; expected int"),
        (f"[a]\n{CASE}repeats = 0", "at least 1"),
        (f"[a]\n{CASE}".replace("time", "guess"), "kind is 'guess'"),
        (f"[a]\n{CASE}".replace("ours-int8", "ours-int7"), "no side 'ours-int7'"),
        (f"[a]\n{CASE}".replace("[448, 448]", "[448]"), "expected \\[width, height\\]"),
    ],
)
def test_a_scenario_that_cannot_be_run_is_told(text: str, message: str) -> None:
    with pytest.raises(scenarios.ScenarioError, match=message):
        scenarios.read_scenarios(text)


def test_pictures_are_cut_as_the_scenarios_say() -> None:
    config = SlicingConfig(448, 14, 9, True, (0.5,) * 3, (0.5,) * 3)
    for scenario in scenarios.read_scenarios(scenarios.FILE.read_text("utf-8")).values():
        items = cut(config, *scenario.picture, scenario.slices)
        assert [item.tgt_size for item in items] == [(32, 32)] * scenario.slices
    with pytest.raises(ValueError, match="10 slices, the scenario says 9"):
        cut(config, 1344, 1344, 9)
    assert all(len(cut(config, *size)) == 1 for size in shapes(20))
    assert len(set(shapes(200))) > 100
    assert picture(28, 14).shape == (14, 28, 3)


# --- children -----------------------------------------------------------------------------------------------

SIDE = """
import os, sys, time
from benchmarks.harness.child import require, serve

class Side:
    def __init__(self, options):
        self.options = options
    def echo(self, **arguments):
        print("noise on stdout")
        return [self.options["threads"], os.environ["OMP_NUM_THREADS"], arguments]
    def hold(self, megabytes):
        block = bytearray(megabytes << 20)
        time.sleep(0.2)
        return len(block)
    def spin(self):
        import threading
        def turn():
            while True:
                pass
        threading.Thread(target=turn, daemon=True).start()
    def need(self):
        require("a_package_that_is_not_there")
    def fall(self):
        raise ValueError("on its nose")
    def die(self):
        print("last words", file=sys.stderr)
        os._exit(3)

serve(Side)
"""


@pytest.fixture
def side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a_side.py").write_text(SIDE)
    monkeypatch.setattr("benchmarks.harness.child.SOURCE_ROOTS", (".", "kernels", "converters", str(tmp_path)))
    with Child("a_side", {"threads": 1}, tmp_path / "log") as child:
        yield child


def test_a_child_answers_and_tells_what_went_wrong(side: Child) -> None:
    assert side.call("echo", width=3) == [1, "1", {"width": 3}]
    with pytest.raises(SideError, match="ValueError: on its nose"):
        side.call("fall")
    assert side.call("echo") == [1, "1", {}]  # it goes on
    with pytest.raises(SideError, match="exit code 3; last line: last words"):
        side.call("die")


def test_a_missing_package_is_no_failure(side: Child) -> None:
    with pytest.raises(Skipped, match="a_package_that_is_not_there"):
        side.call("need")


@pytest.mark.skipif(not CAN_STOP or not Path("/proc/self/stat").exists(), reason="needs SIGSTOP and /proc")
def test_a_child_takes_no_time_between_calls(side: Child) -> None:
    def ticks() -> int:
        user, system = Path(f"/proc/{side.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return int(user) + int(system)

    side.call("spin")
    time.sleep(0.1)  # the signal is on its way
    before = ticks()
    time.sleep(0.3)
    assert ticks() == before
    side.call("hold", megabytes=1)
    assert ticks() > before  # it spins while it is called


def test_the_peak_of_a_call_is_seen(side: Child) -> None:
    before = side.memory().rss
    held, peak = side.watch("hold", megabytes=MEGABYTES)
    assert held == MEGABYTES << 20
    assert peak.rss > before + 0.9 * held
    assert side.memory().rss < before + 0.5 * held


def test_the_largest_memory_is_kept() -> None:
    hold = "b = bytearray(100 << 20); print(flush=True); input(); del b; print(flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", hold], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with Peak(process.pid, period_s=0.01) as sampler:
            for _ in range(2):
                process.stdout.readline()
                time.sleep(0.1)
                process.stdin.write("\n")
                process.stdin.flush()
    assert sampler.peak.rss > 100 << 20


# --- planted weights ----------------------------------------------------------------------------------------


def features(path: Path, plant: str, *, exact: bool) -> np.ndarray:
    with mock.patch.object(encoder, "GGUFFile", planted(plant)):
        made = ImageEncoder(path, exact=exact)
    width = made.slicing.scale_resolution
    result = made.tower.encode(cut(made.slicing, width, width))[0]
    assert isinstance(made.file, planted(plant).__base__)
    assert not made.file.unread
    return result


def test_planted_gains_leave_float32_as_it_is(exact_folder: Path) -> None:
    (path,) = exact_folder.glob("mmproj*")
    plain, changed = (features(path, plant, exact=True) for plant in ("none", "gains"))
    assert np.abs(changed - plain).max() < 1e-4
    assert (changed != plain).any()


def test_planted_units_change_the_model_and_cost_int8_more(exact_folder: Path) -> None:
    (path,) = exact_folder.glob("mmproj*")
    worst = {}
    for plant in PLANTS:
        exact, int8 = (features(path, plant, exact=exact) for exact in (True, False))
        worst[plant] = 1 - cosines(int8, exact).min()
    assert worst["gains"] < 2 * worst["none"]  # folded into the weights
    assert worst["fc2"] > worst["none"]
    changed = features(path, "fc2", exact=True)
    assert cosines(changed, features(path, "none", exact=True)).min() < 0.9999


def test_what_is_planted_is_as_described(exact_folder: Path) -> None:
    (path,) = exact_folder.glob("mmproj*")
    plain, changed = GGUFFile(path), planted("gains")(path)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = changed.array("v.blk.0.ln1.weight") / plain.array("v.blk.0.ln1.weight")
        columns = plain.array("v.blk.0.attn_q.weight") / changed.array("v.blk.0.attn_q.weight")
    assert sorted(np.round(ratio))[-11:] == [1.0] + [50.0] * 10
    np.testing.assert_allclose(np.nanmedian(columns, axis=0), ratio, rtol=1e-5)
    assert slicing_config(changed) == slicing_config(plain)
    with pytest.raises(ValueError, match="'weeds'"):
        planted("weeds")


# --- profile ------------------------------------------------------------------------------------------------


def test_a_profile_tells_products_apart(exact_folder: Path) -> None:
    (path,) = exact_folder.glob("mmproj*")
    made = ImageEncoder(path, exact=False)
    slices = cut(made.slicing, 112, 112)
    made.encode([[(item, -1)] for item in slices])
    with Profile() as profile:
        made = ImageEncoder(path, exact=False)
        start = time.perf_counter()
        made.encode([[(item, -1)] for item in slices])
        total = time.perf_counter() - start
        rows = profile.rows()
    assert any("linear_int8" in label and "GELU" in label for label in rows)
    assert sum(seconds for seconds, _ in rows.values()) <= total
    patches = sum(item.n_patches for item in slices)
    width, mlp, layers = made.tower.config.width, made.tower.config.mlp, made.tower.config.layers
    (work,) = (work for label, (_, work) in rows.items() if f"{width} → {mlp}, GELU" in label)
    assert work == pytest.approx(2 * patches * width * mlp * layers / 1e9)
    assert not hasattr(linear_int8.linear_int8, "__wrapped__")  # put back


def test_small_operations_are_summed_up() -> None:
    runs = [(1.0, {"fc1: linear_int8": (0.6, 60.0), "tiny": (0.001, 0.0)}), (3.0, {"fc1: linear_int8": (0.8, 60.0)})]
    product, rest = summarise(runs)
    assert product["seconds"] == pytest.approx(0.7)
    assert product["share"] == pytest.approx(0.35)
    assert product["gops"] == pytest.approx(60 / 0.7)
    assert rest["operation"] == "everything else"
    assert rest["seconds"] == pytest.approx(1.3)
    assert [peak_of(label) for label in ("fc1: linear_int8", "linear 588")] == ["int8", "float32"]


def test_attention_is_counted_per_sequence() -> None:
    starts = np.array([0, 4, 10])
    arguments = {"q": np.zeros((10, 8)), "heads": 2, "q_offsets": starts, "kv_offsets": starts}
    assert describe("attention", arguments) == ("attention, 2 heads of 4", pytest.approx(4 * (16 + 36) * 8 / 1e9))


# --- tables and plot ----------------------------------------------------------------------------------------

MACHINE = {
    "cpu": "A CPU",
    "isa": "avx2",
    "threads": 2,
    "versions": {"numba": "0.1", "torch": "not installed"},
    "load_average": {"start": [0.5, 0, 0], "end": [1.5, 0, 0]},
}
TIME = {
    "scenario": "slice",
    "kind": "time",
    "picture": [448, 448],
    "ours_s": 2.0,
    "peers_s": {"mtmd-f16": 7.0},
    "tower_s": {"ours-int8": 1.5, "openvino-int8": 0.75},
    "samples_s": {"ours-int8": [2.0, 2.0], "mtmd-f16": [7.0, 7.0]},
    "tower_samples_s": {"ours-int8": [1.5, 1.5], "openvino-int8": [0.75, 0.75]},
    "agreement": {"ours-int8": {"tokens": {"mean": 0.9999, "worst": 0.999}}},
}


def vision_result(*results: dict[str, Any]) -> dict[str, Any]:
    skipped = {"torch-int8": "torch cannot be imported"}
    return {"scenario": "vision", "machine": MACHINE, "results": list(results), "skipped": skipped}


def test_a_peer_that_is_faster_stays_in_the_table() -> None:
    text = report.render(vision_result(TIME))
    assert "| edge-runtime, int8 (default) | 1.50 | 2.00 | 1.00 | – | 0.99900 |" in text
    assert "| llama.cpp mtmd, float16 file | – | 7.00 | 3.50 | – | – |" in text
    assert "| OpenVINO, int8 by NNCF | 0.75 | – | 0.50 | – | – |" in text  # with our tower, not with all of ours
    assert "PyTorch, dynamic int8: not measured, torch cannot be imported." in text
    assert "Samples per side: 2, taken in turns." in text
    uneven = TIME | {"samples_s": {"ours-int8": [2.0] * 5, "mtmd-f16": [7.0]}}
    assert "Samples per side: 1 to 5, taken" in report.render(vision_result(uneven))
    assert "A CPU, avx2, 2 threads; load average 0.5 at the start and 1.5 at the end. Versions: numba 0.1." in text


def test_every_kind_has_a_table() -> None:
    at = {"anon": 100e6, "rss": 250e6}
    stages = dict.fromkeys(("peak_loading", "loaded", "peak", "after"), at)
    row = {"plant": "fc2", "features": {"mean": 0.99, "worst": 0.9}, "tokens": {"mean": 0.98, "worst": 0.8}}
    operations = [{"operation": "fc1: linear_int8", "seconds": 1.0, "share": 0.5, "gops": 50.0}]
    start = {"start_s": 1, "load_and_repack_s": 2, "first_s": 9, "second_s": 7, "cache_misses": 0}
    text = report.render(
        vision_result(
            {"kind": "memory", "settled": 20, "pictures": 200, "slices": 10}
            | {"sides": {"ours-int8": stages | {"growth_anon": -1e5}}},
            {"kind": "startup", "picture": [1344, 1344], "sides": {"ours-int8": start}},
            {"kind": "accuracy", "rows": [row]},
            {"kind": "profile"}
            | {"sides": {"ours-int8": {"seconds": 2.0, "peak_gops": {"int8": 200.0}, "operations": operations}}},
        )
    )
    for line in (
        "| edge-runtime, int8 (default) | 100 / 250 | 100 / 250 | 100 / 250 | 100 / 250 | -0.1 |",
        "| edge-runtime, int8 (default) | 1.00 | 2.00 | 9.00 | 7.00 | 0 |",
        "| 5 hidden units of each MLP × 30 | 0.99000 | 0.90000 | 0.98000 | 0.80000 |",
        "| fc1: linear_int8 | 50.0% | 50 | 25% |",
    ):
        assert line in text


def test_results_that_are_kept_can_be_rendered() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert report.render(json.loads(path.read_text("utf-8"))).count("|") > 8
    side = {"requests_per_s": 0.2}
    found = {"4": {"ours": side, "llama-server": {"requests_per_s": 0.1}, "ratio_of_requests": 2.0}}
    assert "| 4 | 0.200 | 0.100 | 2.00 |" in report.render({"scenario": "load_peer", "model": "a", "clients": found})
    with pytest.raises(ValueError, match="no table for the scenario 'weather'"):
        report.render({"scenario": "weather"})


def test_results_that_are_kept_are_in_the_document() -> None:
    """`python benchmarks/report.py benchmarks/results/*.json --write benchmarks/README.md` writes them anew."""
    text = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        result = json.loads(path.read_text("utf-8"))
        assert f"### {path.name}\n" in text
        assert f"; {report.machine_name(result)}.\n\n{report.render(result)}\n" in text, path.name


def test_a_result_says_when_and_where_it_was_measured(tmp_path: Path) -> None:
    kept = ROOT / "benchmarks" / "results" / "attacked.json"
    assert re.fullmatch(
        r"(\d{4}-\d\d-\d\d, commit [0-9a-f]{7,}|Not committed); znver3, kernels for avx2, 2 threads\.",
        report.provenance(kept, json.loads(kept.read_text("utf-8"))),
    )
    new = {"scenario": "turns", "threads": 2}
    assert report.provenance(tmp_path / "turns.json", new) == "Not committed; processor not recorded, 2 threads."
    new = {"scenario": "convert-q4_k_m-q8_0", "cpu": "znver3", "cpus": 4}
    assert report.provenance(tmp_path / "new.json", new) == "Not committed; znver3, 4 threads."


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    text = f"# Title\n{report.BEGIN}\nold\n{report.END}\nend\n"
    assert report.replace_between_markers(text, "| new |") == (
        f"# Title\n{report.BEGIN}\n\n| new |\n\n{report.END}\nend\n"
    )
    for broken in ("", report.BEGIN, f"{report.END}{report.BEGIN}", text + report.END):
        with pytest.raises(ValueError, match="once each"):
            report.replace_between_markers(broken, "")


def test_names_in_the_plot_do_not_overlap() -> None:
    taken: list[tuple[float, float, float, float]] = []
    for _ in range(30):
        box = _free_box(0.9, 0.5, 0.15, taken)
        assert all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken)
        assert min(box) >= 0
        assert max(box) <= 1
        taken.append(box)
