"""Items → answers from a Ray cluster, in the order in which they are ready: what `batch --ray` runs on."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace

from edge_runtime.answers import Answer
from edge_runtime.batch.items import Failure, Item
from edge_runtime.ray.cluster import connected
from edge_runtime.ray.placing import Chosen, everywhere


def answers(
    address: str, chosen: Chosen, items: Iterable[Item], stopping: threading.Event
) -> Iterator[tuple[Item, Answer | Failure] | None]:
    """Connect, place a model on each node that can hold it, and answer; None now and then while nothing comes.

    Parameters
    ----------
    address : see `cluster.connected`.
    items : taken in another thread, a bounded number ahead of the answers.
    stopping : once it is set, no further item is taken; those at work are finished.

    Raises
    ------
    MessageError
        When the address or an option is wrong.
    BackendUnavailable, NotEnoughMemoryError
        When there is no cluster, no node that can hold the model, or none is left.
    Exception
        Whatever `items` raised.
    """
    mmproj = None if chosen.mmproj is None else everywhere(chosen.mmproj)
    chosen = replace(chosen, model=everywhere(chosen.model), mmproj=mmproj)
    with connected(address):
        # Ray is read here, after `connected` has chosen its settings.
        from edge_runtime.ray.answering import answering
        from edge_runtime.ray.nodes import reserved
        from edge_runtime.ray.spreading import MAX_TRIES, Lost, spread

        with reserved(chosen) as places:
            for pair in spread(items, places, answering(chosen), stopping):
                if pair is None:
                    yield None
                    continue
                item, found = pair
                reason = f"The process that worked on it alone ended {MAX_TRIES} times; try 'run' on one machine."
                yield item, Failure("BackendUnavailable", reason) if isinstance(found, Lost) else found


class ClusterRunner:
    """What `batch.runner.Runner` is on one machine.

    Parameters
    ----------
    address, chosen, items : as of `answers`.
    """

    def __init__(self, address: str, chosen: Chosen, items: Iterable[Item]) -> None:
        self._address, self._chosen, self._items = address, chosen, items
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Take no further item; those at work are finished."""
        self._stopping.set()

    def results(self) -> Iterator[tuple[Item, Answer | Failure] | None]:
        """As `answers`."""
        return answers(self._address, self._chosen, self._items, self._stopping)
