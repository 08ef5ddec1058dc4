"""Items on a cluster of two nodes: each exactly once, while nodes and workers die. Run by `test_ray`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from edge_runtime.errors import BackendUnavailable, NotEnoughMemoryError
from edge_runtime.ray.nodes import reserved
from edge_runtime.ray.placing import Chosen
from edge_runtime.ray.spreading import Lost, spread
from on_ray.cluster import two_nodes
from on_ray.workers import POISON, broken, doubling, poisoned

AFTERWARDS = 200
MOST_UNDER_WAY = 200
"""Two workers have 32 items each, the queue 32; some blocks are between them."""


@pytest.fixture
def nodes() -> Iterator[tuple[Any, Any]]:
    """A cluster and the node without a driver."""
    with two_nodes() as (cluster, second):
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster, second


def test_items_of_dead_nodes_and_workers(nodes):
    cluster, second = nodes
    never = threading.Event()
    with reserved(Chosen()) as places:
        assert len(places.nodes) == 2
        assert 1e6 < places.needed < 1e9

        found = dict(pair for pair in spread(range(40), places, poisoned, never) if pair is not None)
        assert isinstance(found.pop(POISON), Lost)
        assert found == {i: 2 * i for i in range(40) if i != POISON}

        here = ray.get_runtime_context().get_node_id()
        taken, killed = list[int](), threading.Event()
        results: dict[int, tuple[int, str]] = {}
        for pair in spread(_until(killed, taken), places, doubling, never):
            if pair is None:
                continue
            i, result = pair
            assert i not in results
            assert not isinstance(result, Lost)
            results[i] = result
            assert len(taken) - len(results) <= MOST_UNDER_WAY or killed.is_set()
            if not killed.is_set() and sum(node != here for _, node in results.values()) > 40:
                cluster.remove_node(second, allow_graceful=False)
                killed.set()
        assert {i: twice for i, (twice, _) in results.items()} == {i: 2 * i for i in taken}
        assert len(taken) > AFTERWARDS

        with pytest.raises(BackendUnavailable, match=r"answer nothing; .*no model here"):
            list(spread(range(3), places, broken, never))

        stopping = threading.Event()
        some = 0
        for pair in spread(range(10**9), places, doubling, stopping):
            if pair is not None:
                some += 1
                stopping.set()
        assert 1 <= some < 200, "what was begun is finished, and nothing else"

        with pytest.raises(ZeroDivisionError):
            list(spread((1 // (5 - i) for i in range(9)), places, doubling, never))


def _until(killed: threading.Event, taken: list[int]) -> Iterator[int]:
    """Items until the node was killed, and some more; what was taken is noted."""
    afterwards = 0
    while afterwards < AFTERWARDS:
        afterwards += killed.is_set()
        taken.append(len(taken))
        yield taken[-1]


def test_nodes_without_the_model_or_the_memory(tmp_path):
    with two_nodes(memory=20 << 20) as (cluster, _):
        ray.init(address=cluster.address, log_to_driver=False)
        nowhere = str(tmp_path / "nowhere")
        for chosen, kind, reason in (
            (Chosen(nowhere), BackendUnavailable, "neither 'demo' nor an existing folder"),
            (Chosen(sees=(str(tmp_path), nowhere)), BackendUnavailable, "does not see .*nowhere; mount it"),
            (Chosen(), NotEnoughMemoryError, r"needs 0\.\d+ GB of memory, Ray may use 0\.02 GB"),
        ):
            with pytest.raises(kind, match=f"No node .* can hold .*{reason}"), reserved(chosen):
                pass
