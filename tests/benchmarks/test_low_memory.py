"""The benchmark of memory: stages in order, and a table of them; groups need rights that tests do not have."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import edge_runtime
from benchmarks import low_memory, report

DEMO = Path(edge_runtime.__file__).parent / "demo"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells anonymous memory")
def test_memory_is_told_by_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "low.json"
    arguments = [
        "low_memory.py",
        str(DEMO),
        "--limit",
        "0",
        "--max-tokens",
        "8",
        "--threads",
        "1",
        "--json",
        str(path),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    low_memory.main()
    result = json.loads(path.read_text())
    assert [*result["stages"]][:4] == ["start", "load", "encode", "prefill"]
    peaks = [peak["anon"] for peak in result["stages"].values()]
    assert 0 < max(peaks) == result["peak_anon"] < result["peak_rss"] < 2e9
    assert result["completion_tokens"] > 0
    assert result["group"] is None
    assert report.machine_name(result).endswith(", 1 threads")
    assert "| prefill |" in report.render(result)
