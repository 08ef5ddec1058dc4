"""Which tasks are computed now: those that give way wait for all others, wherever they are in their work.

A task that gives way (`Request.gives_way`) takes part in a step only while no other is queued or running, and while
its own `gives_way` says no. What it holds of the KV cache stays until somebody needs the room.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from edge_runtime.engine.task import Task


def in_turn(tasks: Iterable[Task]) -> list[Task]:
    """Those tasks that take part in the next step; some of them may be queued."""
    tasks = [*tasks]
    urgent = [task for task in tasks if not task.gives_way]
    found = urgent or [task for task in tasks if not task.is_held]
    for task in tasks:
        if task.gives_way and task not in found:
            task.is_paused = True
        elif task.is_paused:
            task.is_paused = False
            task.laps.restart()  # waiting for others is no work
    return found


def first_to_leave(active: Sequence[Task]) -> Task:
    """The task that is preempted when there is no room: the youngest, those that give way before all others."""
    giving_way = [task for task in active if task.gives_way]
    return max(giving_way or active, key=lambda task: task.laps.started)
