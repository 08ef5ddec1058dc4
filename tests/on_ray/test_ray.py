"""Ray, in processes of their own: its warnings and threads are not ours."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
"""Ray reads them when it is imported: every port on 127.0.0.1 alone, nothing reported to its makers."""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`")
@pytest.mark.parametrize("name", ["serving.py", "spreading.py", "batching.py", "asking.py"])
def test_on_ray(name, tmp_path):
    options = [
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-o",
        "filterwarnings=default",
        "--disable-warnings",
        "-p",
        "no:logging",
    ]
    command = [sys.executable, "-m", "pytest", *options, str(Path(__file__).with_name(name))]
    stores = {"EDGE_RUNTIME_MODELS": str(tmp_path / "models"), "EDGE_RUNTIME_CACHE_DIR": str(tmp_path / "cache")}
    environment = {**os.environ, **SETTINGS, **stores, "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(TESTS)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
