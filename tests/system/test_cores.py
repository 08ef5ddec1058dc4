"""Test processes side by side: each keeps to a core, and tests that need every core have them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import cores

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are pinned on Linux only")

WORK = """
import os, threading
from support.cores import every_core, pin_worker
ended = threading.Event()
thread = threading.Thread(target=ended.wait)
thread.start()
def show():
    print(*(sorted(os.sched_getaffinity(id)) for id in (0, thread.native_id)), sep=";")
pin_worker()
show()
with every_core():
    show()
show()
print(os.environ.get("PYTEST_XDIST_WORKER"), os.environ["NUMBA_NUM_THREADS"])
ended.set()
"""


@pytest.mark.every_core
@pytest.mark.parametrize("worker", [0, 1, 5])
def test_a_worker_keeps_to_a_core_but_for_tests_that_need_all(worker):
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTEST_XDIST_WORKER": f"gw{worker}"}
    done = subprocess.run(
        [sys.executable, "-c", WORK], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    every = sorted(os.sched_getaffinity(0))
    found = cores._cores(set(every))
    own = sorted(found[worker % len(found)])
    assert done.stdout.splitlines() == [f"{own};{own}", f"{every};{every}", f"{own};{own}", f"None {len(every)}"]


def test_every_cpu_belongs_to_one_core():
    every = os.sched_getaffinity(0)
    found = cores._cores(every)
    assert set().union(*found) == every
    assert sum(map(len, found)) == len(every)
