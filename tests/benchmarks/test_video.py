"""The video benchmark on the tiny model: both sides do the work they should, and the sums are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.video import summarise

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = {
    "ours": {
        "3": {"first_token_s": 20.0, "prompt_tokens": 400},
        "6": {"first_token_s": 10.0, "prompt_tokens": 200},
    },
    "mtmd": {
        "encoded": [{"seconds": 6.0, "frames": 3}, {"seconds": 1.0, "frames": 1}],
        "prefill": {"seconds": 40.0, "prompt_tokens": 1200},
    },
}


def test_mtmd_is_extrapolated_by_frames() -> None:
    facts = summarise(SAMPLES, 100)
    assert facts["peers_s"] == {"mtmd": pytest.approx(7 / 4 * 100 + 40)}
    assert facts["times_faster"] == {"packing 3": pytest.approx(10.75), "packing 6": pytest.approx(21.5)}
    assert facts["times_fewer_tokens"] == {"packing 3": 3.0, "packing 6": 6.0}
    machine = {"cpu": "c", "isa": "i", "threads": 2, "versions": {}, "load_average": {"start": None}}
    table = report.render({"scenario": "video", "frames": 100, "machine": machine, **facts})
    assert "| edge-runtime, packing 6 | 10.0 | 200 | 21.50 | 6.00 |" in table
    assert "| llama.cpp mtmd, each frame a picture | 215.0 | 1200 | 1.00 | 1.00 |" in table
    assert "1.75 s a frame, measured on 4 frames, times 100, and 40 s measured" in table


@pytest.mark.slow
def test_both_sides_answer_about_the_same_frames(exact_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "video.json"
    options = [
        "--frames",
        "7",
        "--peer-frames",
        "3",
        "--threads",
        "1",
        "--logs",
        str(tmp_path),
        "--json",
        str(target),
    ]
    done = subprocess.run(
        [sys.executable, "benchmarks/video.py", str(exact_folder), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + "".join(p.read_text() for p in tmp_path.glob("*.log"))
    facts = json.loads(target.read_text())
    assert facts == json.loads(done.stdout.splitlines()[-1])
    ours = facts["samples"]["ours"]
    assert {packing: (found["frames"], found["groups"]) for packing, found in ours.items()} == {
        "3": (7, 3),
        "6": (7, 2),
    }
    assert all(found["cached_tokens"] < 8 for found in ours.values())
    assert facts["mtmd"]["measured_frames"] == 3
    assert facts["tokens"]["mtmd"] > 7 * 64 > facts["tokens"]["packing 3"] > facts["tokens"]["packing 6"]
    assert "7 frames" in report.render(facts)
