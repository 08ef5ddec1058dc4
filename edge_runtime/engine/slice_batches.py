"""Which slices are encoded next, of all requests that wait for some; frames of videos as they come from the decoder.

A frame that cannot be decoded ends the requests that want it, and no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from edge_runtime.engine.task import Task
from edge_runtime.inputs.slice_groups import Group, LazyGroup, LoadedGroup, n_patches

GROUPS_AHEAD = 2
"""Of a video: decoded while another one is encoded."""
WAIT_S = 0.05
"""How long to wait for a frame before looking whether there is something else to do."""


@dataclass
class Batch:
    """Groups to be encoded together."""

    groups: dict[bytes, LoadedGroup] = field(default_factory=dict)
    failed: dict[Task, Exception] = field(default_factory=dict)
    """Tasks whose next group cannot be made."""
    waiting: dict[Task, LazyGroup] = field(default_factory=dict)
    """Tasks whose next group is not made yet."""


def next_batch(tasks: Sequence[Task], max_patches: int) -> Batch:
    """Choose from what tasks are missing, in their order.

    Parameters
    ----------
    max_patches : of the batch; one group is taken however large it is.
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
            except Exception as error:  # noqa: BLE001 - handed to the one who asked for this video
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
    """Report frames that are being decoded.

    Parameters
    ----------
    idle : there is nothing else to do: wait for a moment, too.
    """
    for task, group in waiting.items():
        done, total = group.reading
        task.report("decode", done, total, done / total)
        if idle:
            group.wait(WAIT_S / len(waiting))
