"""Choose the slices to encode next across all requests; video frames are taken as the decoder delivers them.

A frame that cannot be decoded fails only the requests that need it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from edge_runtime.engine.task import Task
from edge_runtime.inputs.slice_groups import Group, LazyGroup, LoadedGroup, n_patches

GROUPS_AHEAD = 2
"""Groups of a video decoded while another one is encoded."""
WAIT_S = 0.05
"""How long to wait for a frame before checking for other work."""


@dataclass
class Batch:
    """Groups to encode together."""

    groups: dict[bytes, LoadedGroup] = field(default_factory=dict)
    failed: dict[Task, Exception] = field(default_factory=dict)
    """Tasks whose next group cannot be built."""
    waiting: dict[Task, LazyGroup] = field(default_factory=dict)
    """Tasks whose next group is not ready yet."""


def next_batch(tasks: Sequence[Task], max_patches: int) -> Batch:
    """Choose from the groups that tasks are missing, in task order.

    Parameters
    ----------
    max_patches : limit of the batch; one group is always taken, however large.
    """
    batch, patches = Batch(), 0
    for task in tasks:
        for digest, group in task.pictures.missing.items():
            if digest in batch.groups or (batch.groups and patches + n_patches(group) > max_patches):
                continue
            if isinstance(group, LazyGroup) and not group.ask():
                batch.waiting[task] = group
                break
            try:
                batch.groups[digest] = group.load() if isinstance(group, LazyGroup) else group
            except Exception as error:  # noqa: BLE001 - reported to the task that needs this video
                batch.failed[task] = error
                break
            patches += n_patches(group)
        _ask(
            islice(
                (group for digest, group in task.pictures.missing.items() if digest not in batch.groups), GROUPS_AHEAD
            )
        )
    return batch


def _ask(groups: Iterable[Group]) -> None:
    for group in groups:
        if isinstance(group, LazyGroup):
            group.ask()


def await_frames(waiting: dict[Task, LazyGroup], *, idle: bool) -> None:
    """Report progress on frames that are being decoded.

    Parameters
    ----------
    idle : nothing else to do, so also wait a moment.
    """
    for task, group in waiting.items():
        done, total = group.reading
        task.report("decode", done, total, done / total)
        if idle:
            group.wait(WAIT_S / len(waiting))
