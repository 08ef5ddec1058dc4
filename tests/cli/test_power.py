"""`--threads` and `--nice`: what a laptop on its battery is told to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_runtime import Model
from edge_runtime.cli.program import main
from edge_runtime.system import priority

EXAMPLE = Path(__file__).parents[2] / "examples" / "sign.png"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(not hasattr(os, "nice"), reason="Windows has classes instead")
@pytest.mark.parametrize("command", [["run", "Hi", "--greedy", "--max-tokens", "1"], ["info"]], ids=["run", "info"])
def test_nice_lowers_the_priority_of_all_threads(command):
    """They inherit it, so it must be lowered before they start; commands without the option do not know it."""
    arguments = [*command, "--nice", "7"] if command[0] == "run" else command
    before, *after = python(
        f"""
import os, sys
from pathlib import Path
print(os.nice(0))
from edge_runtime.cli.program import main
try:
    main({arguments!r}, standalone_mode=False)
finally:
    sys.stdout.flush()
    threads = [int(path.name) for path in Path("/proc/self/task").iterdir()] if os.path.isdir("/proc") else [0]
    print("found", *sorted({{os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}}))
"""
    ).splitlines()
    expected = int(before) + 7 * (command[0] == "run")
    assert after[-1] == f"found {expected}"


@pytest.mark.parametrize("command", [["run", "Hi"], ["serve"], ["batch", "x.png", "-p", "?", "-o", "o.jsonl"]])
@pytest.mark.parametrize("value", ["20", "-1", "much"])
def test_values_that_mean_nothing_are_refused(command, value):
    result = CliRunner().invoke(main, [*command, "--nice", value])
    assert result.exit_code == 2
    assert "--nice" in result.stderr


def test_help_tells_of_it_where_something_is_computed():
    for command in ("run", "serve", "batch", "bench"):
        assert "--nice" in CliRunner().invoke(main, [command, "--help"]).stdout


def test_where_it_is_impossible_a_line_says_so(monkeypatch, caplog):
    def refuse(n: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "nice", refuse, raising=False)
    priority.be_nice(5)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(
        "The priority cannot be lowered here ([Errno 1] Operation not permitted); the work goes on"
    )
    caplog.clear()
    priority.be_nice(0)
    assert not caplog.records


def test_windows_has_classes(monkeypatch):
    given = []

    class Process:
        def nice(self, value: int) -> None:
            given.append(value)

    monkeypatch.delattr(os, "nice", raising=False)
    monkeypatch.setattr(priority.psutil, "Process", Process)
    for name, value in (("BELOW_NORMAL_PRIORITY_CLASS", 16384), ("IDLE_PRIORITY_CLASS", 64)):
        monkeypatch.setattr(priority.psutil, name, value, raising=False)
    for n in (1, 9, 10, 19):
        priority.be_nice(n)
    assert given == [16384, 16384, 64, 64]


def test_nodes_of_a_cluster_are_not_ours_to_slow_down():
    arguments = ["batch", "x.png", "-p", "?", "-o", "o.jsonl", "--ray", "local", "--nice", "0"]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, "--nice cannot be given with --ray" in result.stderr) == (2, True)


def test_more_threads_than_processors_are_not_started(monkeypatch, caplog):
    monkeypatch.setattr("edge_kernels.threads.thread_limit", lambda: 1)
    with Model.load("demo", n_threads=64) as model:
        from edge_kernels.threads import thread_count

        assert model.engine.run(thread_count) == 1
        assert (
            model.chat([{"role": "user", "content": [Path(EXAMPLE), "What does it say?"]}], greedy=True).answer
            == "CAFE"
        )
    assert [record.getMessage() for record in caplog.records] == [
        "64 threads were asked for, but no more than 1 can compute at once here: 1 run."
    ]
    caplog.clear()
    with Model.load("demo", n_threads=1):
        assert not caplog.records
