"""The load benchmark: a short run against a server of its own; and that it notices what it is there for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.load import Tally, percentile

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "load.py"


@pytest.mark.slow
def test_a_short_load_holds():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--minutes", "0.1", "--clients", "6"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, facts["passed"], facts["other_errors"]) == (0, True, {}), done.stderr[-2000:]
    assert facts["ends"]["ok"] >= 6
    assert facts["tokens"] > 0
    assert 0 < facts["first_token_s"]["median"] <= facts["first_token_s"]["p95"] < 60
    assert len(facts["rss_anon_mb"]) >= 4


def test_the_numbers():
    tally = Tally(seconds=10.0, tokens=80, first_token_s=[1.0, 3.0, 2.0])
    tally.ends.update(["ok", "ok", "429"])
    facts = tally.facts()
    assert (facts["requests_per_s"], facts["tokens_per_s"]) == (0.2, 8.0)
    assert facts["first_token_s"] == {"median": 2.0, "p95": 2.9}
    assert percentile([5.0], 95) == 5.0
    assert Tally().facts()["first_token_s"] is None
