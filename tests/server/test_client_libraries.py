"""LiteLLM, pydantic-ai, instructor and Vercel's AI SDK against the server, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from server.conftest import Served

SDK = Path(__file__).with_name("ai_sdk")
NEEDED = ("litellm", "pydantic_ai", "instructor")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["client_libraries.py", "instructor_client.py"])
@pytest.mark.skipif(not all(map(find_spec, NEEDED)), reason="needs the extra `clients`")
def test_client_libraries(server: Served, name):
    # Without prices from the network, and with warnings as these libraries like them.
    settings = {"EDGE_URL": server.url, "NO_PROXY": "127.0.0.1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    environment = {**os.environ, **settings}
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    command = [sys.executable, "-m", "pytest", *options, str(Path(__file__).with_name(name))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


@pytest.mark.slow
@pytest.mark.skipif(not (SDK / "node_modules" / "ready").exists(), reason="needs `make clients`")
def test_the_ai_sdk(server: Served):
    command = ["node", str(SDK / "check.mjs"), server.url]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "NODE_NO_WARNINGS": "1", "AI_SDK_LOG_WARNINGS": "false"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert run.stdout.count("ok  ") >= 29
