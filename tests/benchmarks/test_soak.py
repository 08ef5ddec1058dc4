"""The soak: a bounded run in a process of its own; and that it notices what it is there for."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from itertools import count
from pathlib import Path

import pytest

from benchmarks import soak
from edge_runtime import Model

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


STALLED_S = 600.0
"""Without a line from the soak, which prints one every few requests: it hangs, however busy the machine is."""


def lines_of(child: subprocess.Popen[str]) -> list[str]:
    """What a process prints until it ends; ended when it prints nothing for long."""
    assert child.stdout is not None
    printed: list[str] = []
    with child:
        while True:
            watchdog = threading.Timer(STALLED_S, child.kill)
            watchdog.start()
            line = child.stdout.readline()
            watchdog.cancel()
            if not line:
                return printed
            printed.append(line)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--cache",)], ids=["memory", "disk"])
def test_hundreds_of_requests_leave_nothing_behind(options):
    """The process's own memory is looked at, so not in the one that runs all other tests."""
    child = subprocess.Popen(
        [sys.executable, "-u", str(SCRIPT), "--requests", "500", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    printed = lines_of(child)
    assert child.returncode == 0, "".join(printed)[-4000:]
    facts = json.loads(printed[-1])
    assert facts["passed"]
    assert facts["sequences_free"]
    assert sum(facts["ends"].values()) == 500  # none is lost
    assert {"cancelled", "forgotten", "ImageError", "PromptTooLongError", "ModelFileError"} <= facts["ends"].keys()


@pytest.fixture
def model(exact_folder: Path):
    with Model.load(exact_folder, exact=True, n_ctx=1024) as loaded:
        yield loaded


def test_a_mixed_answer_is_noticed(model):
    prepared = soak.prepare(model, seed=1, n_pictures=2)
    one, other = list(prepared.expected)[:2]
    assert prepared.expected[one] != prepared.expected[other]
    prepared.expected[one], prepared.expected[other] = prepared.expected[other], prepared.expected[one]
    facts = soak.run(prepared, 60, say=lambda line: None)
    assert facts["wrong"]
    assert not facts["passed"]
    assert facts["sequences_free"]


def test_growing_memory_is_noticed(model, monkeypatch):
    prepared = soak.prepare(model, seed=1, n_pictures=1)
    megabytes = count(100)
    monkeypatch.setattr(soak, "rss_anon_mb", lambda: float(next(megabytes)))
    monkeypatch.setattr(soak, "WARM_UP", 10)
    monkeypatch.setattr(soak, "SAMPLE_EVERY", 5)
    facts = soak.run(prepared, 60, say=lambda line: None)
    assert facts["growth_mb"] > soak.MOST_GROWTH_MB
    assert not facts["passed"]
    assert not facts["wrong"]
