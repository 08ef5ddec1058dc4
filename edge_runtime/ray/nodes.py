"""A cluster and a model → the nodes that can hold it: one place reserved on each, with the memory it needs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from edge_runtime.errors import BackendUnavailable, EdgeRuntimeError, NotEnoughMemoryError
from edge_runtime.ray.placing import Chosen, memory_needed, model_here
from edge_runtime.version import __version__

logger = logging.getLogger("edge_runtime.ray")

RESERVE_S = 60.0
"""For other jobs to leave the nodes."""


@dataclass(frozen=True)
class Report:
    """What a node says of a model."""

    version: str
    """Of edge-runtime there."""
    needed: int = 0
    """Bytes."""
    problem: str = ""
    """Why it cannot hold the model; empty if it can."""


@dataclass(frozen=True)
class Places:
    """Nodes with a place for the model."""

    group: PlacementGroup
    nodes: frozenset[str]
    """Ids."""
    needed: int
    """Bytes reserved on each."""

    def alive(self) -> int:
        """How many of the nodes still live."""
        return sum(node["Alive"] and node["NodeID"] in self.nodes for node in ray.nodes())


def _report(chosen: Chosen) -> Report:
    """Runs on a node: its files of the model, pulled if they are not there, and the memory they need."""
    places = [chosen.folder, *chosen.sees] if chosen.folder else chosen.sees
    missing = next((path for path in places if not Path(path).exists()), None)
    if missing is not None:
        return Report(__version__, problem=f"it does not see {missing}; mount it there under the same path.")
    try:
        return Report(__version__, memory_needed(model_here(chosen.model, chosen.mmproj), chosen.load))
    except EdgeRuntimeError as error:
        return Report(__version__, problem=str(error))


@contextlib.contextmanager
def reserved(chosen: Chosen) -> Iterator[Places]:
    """Reserve a place on every node that can hold the model, while the block lasts; the others are named in the log.

    Nodes that do not have the model pull it, if its name says from where.

    Raises
    ------
    NotEnoughMemoryError
        When no node has the memory.
    BackendUnavailable
        When no node can hold it for other reasons, or other jobs keep the nodes.
    """
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    reports = _reports(nodes, chosen)
    needed = max((report.needed for report in reports.values()), default=0)
    problems = {node: _problem(nodes[node], report, needed) for node, report in reports.items()}
    for node, problem in problems.items():
        if problem:
            logger.warning("The node %s is left out: %s", _name(nodes[node]), problem)
    fitting = [node for node in nodes if not problems[node]]
    if not fitting:
        kind = NotEnoughMemoryError if all(not report.problem for report in reports.values()) else BackendUnavailable
        first = next(iter(problems))
        raise kind(f"No node of the cluster can hold {chosen.model}. {_name(nodes[first])}: {problems[first]}")
    group = placement_group(
        [{"CPU": 1, "memory": needed} for _ in fitting],
        strategy="STRICT_SPREAD",
        bundle_label_selector=[{"ray.io/node-id": node} for node in fitting],
    )
    try:
        if not group.wait(RESERVE_S):
            raise BackendUnavailable(
                f"{len(fitting)} nodes have {needed / 1e9:.1f} GB for {chosen.model}, but other jobs hold their "
                "processors or memory; wait for those to end ('ray status' shows them)."
            )
        yield Places(group, frozenset(fitting), needed)
    finally:
        remove_placement_group(group)


def _reports(nodes: Iterable[str], chosen: Chosen) -> dict[str, Report]:
    """Ask every node at the same time."""
    ask = ray.remote(num_cpus=0, max_retries=1)(_report)
    asked = {
        node: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(chosen)
        for node in nodes
    }
    found = {}
    for node, answer in asked.items():
        try:
            found[node] = ray.get(answer)
        except Exception as error:  # noqa: BLE001 - whatever it is, this node cannot be used
            found[node] = Report(__version__, problem=f"edge-runtime does not run there: {error}".splitlines()[0])
    return found


def _problem(node: Mapping[str, Any], report: Report, needed: int) -> str:
    """Why a node cannot hold the model; empty if it can."""
    if report.problem:
        return report.problem
    if report.version != __version__:
        return f"it has edge-runtime {report.version}, expected {__version__}, as here; install the same version."
    resources = node["Resources"]
    if resources.get("memory", 0) < needed:
        return (
            f"the model needs {needed / 1e9:.2f} GB of memory, Ray may use {resources.get('memory', 0) / 1e9:.2f} GB "
            "there; use a smaller --ctx or --kv-type q8_0, or start the node with 'ray start --memory BYTES'."
        )
    if resources.get("CPU", 0) < 1:
        return "Ray may use no processor there; start the node with 'ray start --num-cpus N'."
    return ""


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"
