"""Waiting threads sleep soon: what OpenMP itself says of its settings, whoever loads it first."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from edge_kernels.waiting import SPINS, spin_briefly

FIRST = {
    "numba's threads": "from edge_kernels.threads import start_threads; start_threads()",
    "llama.cpp": "from edge_runtime.decoder.llama_cpp import library; library()",
}


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP is GNU's on Linux alone")
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize(
    ("set_by_user", "expected"), [({}, SPINS), ({"GOMP_SPINCOUNT": "77"}, 77), ({"OMP_WAIT_POLICY": "PASSIVE"}, 0)]
)
def test_openmp_has_heard_it(first, set_by_user, expected):
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", FIRST[first]],
        env={**environment, "OMP_DISPLAY_ENV": "VERBOSE", **set_by_user},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    assert found, done.stderr
    assert int(found[1]) == expected


def test_what_the_user_has_set_stays(monkeypatch):
    for name, value in (("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "5")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        monkeypatch.setenv(name, value)
        spin_briefly()
        assert os.environ[name] == value
        assert os.environ.get("GOMP_SPINCOUNT") in (None, "5")
