"""A Ray cluster for a test: two nodes on this machine, on the loopback alone, and no process left afterwards."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

NODE: dict[str, Any] = {
    "num_cpus": 1,
    "memory": 2 << 30,
    "object_store_memory": 100 << 20,
    "include_dashboard": False,
}


@contextlib.contextmanager
def two_nodes(**changes: Any) -> Iterator[tuple[Cluster, Any]]:
    """A cluster, and its second node, on which no driver runs."""
    before = {process.pid for process in psutil.process_iter()}
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, **changes})
    try:
        yield cluster, cluster.add_node(**{**NODE, **changes})
    finally:
        if ray.is_initialized():
            ray.shutdown()
        cluster.shutdown()
        _all_ended(before)


def _all_ended(before: set[int]) -> None:
    """Check that every process of the cluster has ended; those of a node that was killed end by themselves."""
    ends = time.monotonic() + 60
    while left := [process for process in psutil.Process().children(recursive=True) if process.pid not in before]:
        if time.monotonic() > ends:
            for process in left:
                process.kill()
            raise AssertionError(f"these processes were left: {left}")
        time.sleep(0.2)
