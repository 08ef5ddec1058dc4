"""Items → their results from the nodes of a cluster, by Ray Data, each exactly once, as they come.

    items ─ feeding ─ queue ─ [read task] ─ blocks ─ [one worker per node] ─ blocks ─ results
            (thread)  (bounded)    Ray Data, which bounds what is between

An item leaves only when its result is here. What a node that died had, Ray Data gives up; those items are given out
again in the next round, to the nodes that live. From the third round on items go one at a time, and workers note what
they begin: an item that ended its worker `MAX_TRIES` times is `Lost`, and none is blamed for its neighbour. Knows
nothing of models and files.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import queue
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from operator import itemgetter
from typing import Any, Generic, TypeVar

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from edge_runtime.errors import BackendUnavailable
from edge_runtime.ray.nodes import Places

Item = TypeVar("Item")
Result = TypeVar("Result")

BLOCK_ITEMS = 4
"""Items that travel together; a block costs Ray Data tens of milliseconds."""
BLOCKS_AT_WORK = 4
"""Blocks that a worker has begun. Their items make two of the decoder's calls of eight: while one is computed, the
pictures of the other are decoded. As many again wait at the worker."""
QUEUED_BLOCKS = 8
MAX_TRIES = 2
LOOK_S, LOOKS_PER_ROLL_CALL = 0.2, 25
"""Between two moments in which the caller is free for signals and a display, while no result comes; and how many of
these are between two looks at which nodes live."""
GIVE_UP_S = 10.0
"""For threads of a round that has ended."""
COLUMN = "pickled"

# What Ray 2.64 will no longer take (pyproject.toml excludes it): how often a task is tried, and where.
warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", module=__name__)


class Lost:
    """In the place of a result: the item's worker ended each time."""


class Worker(Generic[Item, Result]):
    """Ray Data's actor: makes its function once, then gives it every item.

    Parameters
    ----------
    make : makes the function from item to result, which many threads call at the same time.
    begun : where the numbers of items go before they are begun; None notes nothing.
    """

    def __init__(self, make: Callable[[], Callable[[Item], Result]], begun: Queue | None) -> None:
        self._answer, self._begun = make(), begun
        self._threads = ThreadPoolExecutor(BLOCK_ITEMS * BLOCKS_AT_WORK, "edge-runtime items")

    async def __call__(self, block: dict[str, Any]) -> dict[str, list[bytes]]:
        """Results of the items of one block."""
        loop = asyncio.get_running_loop()
        numbered = pickle.loads(block[COLUMN][0])
        if self._begun is not None:
            await self._begun.put_async([number for number, _ in numbered])
        working = [loop.run_in_executor(self._threads, self._answer, item) for _, item in numbered]
        results = await asyncio.gather(*working)
        return {
            COLUMN: [pickle.dumps([(number, result) for (number, _), result in zip(numbered, results, strict=True)])]
        }


class _Source(Datasource):  # type: ignore[misc] # Ray has no types here
    """What comes through a queue, as a data set with a row for each block."""

    def __init__(self, blocks: Queue) -> None:
        super().__init__()
        self._blocks = blocks

    def estimate_inmemory_data_size(self) -> None:
        """Unknown."""

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """One task, which Ray pauses while what it has read is not needed."""
        blocks = self._blocks

        def read() -> Iterator[pa.Table]:
            while (block := blocks.get()) is not None:
                yield pa.table({COLUMN: pa.array([block], pa.large_binary())})

        return [ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None))]


def spread(
    items: Iterable[Item],
    places: Places,
    make: Callable[[], Callable[[Item], Result]],
    stopping: threading.Event,
) -> Iterator[tuple[Item, Result | Lost] | None]:
    """Give every item to a worker on one of the nodes.

    Parameters
    ----------
    items : taken in another thread, a bounded number ahead of the results.
    make : makes a worker's function, on its node. Picklable, as items and results are.
    stopping : once it is set, no further item is taken; those at work are finished.

    Yields
    ------
    item, result : in the order in which they are ready; None now and then while there is none.

    Raises
    ------
    BackendUnavailable
        When no node is left.
    """
    rest, left = enumerate(items), list[tuple[int, Item]]()
    tries, n_rounds = Counter[int](), 0
    while True:
        careful = n_rounds >= 2
        round_ = _Round(chain(left, rest), places, make, stopping, careful=careful)
        yield from round_.results()
        if stopping.is_set() or (round_.is_fed and not round_.pending):
            return
        n_rounds += round_.is_fed
        blamed = [number for number in round_.begun() if number in round_.pending]
        if not (round_.n_results or blamed) and (careful or round_.reason):
            raise BackendUnavailable(f"The nodes of the cluster answer nothing; {round_.reason or 'see their logs'}.")
        tries.update(blamed)
        for number in blamed:
            if tries[number] >= MAX_TRIES:
                yield round_.pending.pop(number), Lost()
        left = sorted(round_.pending.items(), key=itemgetter(0))
        if round_.is_fed and not left:
            return


class _Round(Generic[Item, Result]):
    """One data set: from the items that are left to those whose results came."""

    def __init__(
        self,
        numbered: Iterable[tuple[int, Item]],
        places: Places,
        make: Callable[[], Callable[[Item], Result]],
        stopping: threading.Event,
        *,
        careful: bool,
    ) -> None:
        self._numbered, self._places, self._make, self._stopping = numbered, places, make, stopping
        self._n_block, self._n_at_work = (1, 1) if careful else (BLOCK_ITEMS, BLOCKS_AT_WORK)
        self.pending: dict[int, Item] = {}
        """Items that were given out and have no result, by number."""
        self.is_fed = False
        """Whether every item was given out."""
        self.n_results = 0
        self.reason = ""
        """What ended the data set early, if anything."""
        here = {"num_cpus": 0, "scheduling_strategy": _here()}
        self._blocks = Queue(maxsize=QUEUED_BLOCKS, actor_options=here)
        self._begun = Queue(actor_options=here) if careful else None
        self._found: queue.Queue[list[tuple[int, Result]] | BaseException | None] = queue.Queue(1)
        self._given_up = threading.Event()
        self._waited = 0
        self._error: BaseException | None = None

    def begun(self) -> list[int]:
        """Items that workers noted; none unless they were to be careful."""
        if self._begun is None:
            return []
        return [*chain.from_iterable(self._begun.get_nowait_batch(self._begun.qsize()))]

    def results(self) -> Iterator[tuple[Item, Result] | None]:
        """Items and results until all that can come have come, None while there is none; others stay in `pending`.

        Raises
        ------
        BackendUnavailable
            When no node is left.
        Exception
            Whatever `items` raised.
        """
        threads = [threading.Thread(target=work, daemon=True) for work in (self._feed, self._run)]
        for thread in threads:
            thread.start()
        try:
            while (found := self._next()) is not None:
                if not found:
                    yield None
                for number, result in found:
                    if number in self.pending:
                        item = self.pending.pop(number)
                        self.n_results += 1
                        yield item, result
        finally:
            self._given_up.set()
            for thread in threads:  # the next round goes on with the same items
                thread.join(GIVE_UP_S)
            with contextlib.suppress(Exception):
                self._blocks.shutdown(force=True)
        if self._error is not None:
            raise self._error

    def _next(self) -> list[tuple[int, Result]] | None:
        """What came; nothing after a moment, and None at the end."""
        try:
            found = self._found.get(timeout=LOOK_S)
        except queue.Empty:
            self._waited += 1
            if self._waited % LOOKS_PER_ROLL_CALL == 0 and self._places.alive() == 0:
                raise BackendUnavailable(
                    "Every node that held the model is gone; what was answered is kept. Run the same command again "
                    "when there are nodes."
                ) from None
            return []
        if isinstance(found, BaseException):
            if not isinstance(found, ray.exceptions.RayError):
                raise found
            self.reason = str(found).strip().splitlines()[-1]
            return None  # an output that was lost with its node ends the data set; the next round goes on
        return found

    def _feed(self) -> None:
        """Body of the thread that takes the items."""
        block: list[tuple[int, Item]] = []
        try:
            for number, item in self._numbered:
                if self._stopping.is_set():
                    break
                self.pending[number] = item
                block.append((number, item))
                if len(block) == self._n_block:
                    self._put(pickle.dumps(block))
                    block = []
            else:
                self.is_fed = True
            if block:
                self._put(pickle.dumps(block))
        except Exception as error:  # noqa: BLE001 - raised where the results are read
            self._error = error
        with contextlib.suppress(Exception):
            self._put(None)

    def _put(self, block: bytes | None) -> None:
        while not self._given_up.is_set():
            with contextlib.suppress(ray.util.queue.Full):
                self._blocks.put(block, timeout=1.0)
                return

    def _run(self) -> None:
        """Body of the thread that runs the data set."""
        try:
            with _settings():
                for row in self._data().iter_rows():
                    if not self._hand_on(pickle.loads(row[COLUMN])):
                        return
            self._hand_on(None)
        except BaseException as error:  # noqa: BLE001 - raised where the results are read
            self._hand_on(error)

    def _hand_on(self, found: list[tuple[int, Result]] | BaseException | None) -> bool:
        """Whether somebody still waits for results."""
        while not self._given_up.is_set():
            with contextlib.suppress(queue.Full):
                self._found.put(found, timeout=1.0)
                return True
        return False

    def _data(self) -> Any:
        data = ray.data.read_datasource(
            _Source(self._blocks), override_num_blocks=1, num_cpus=0, scheduling_strategy=_here()
        )
        return data.map_batches(
            Worker,
            fn_constructor_args=(self._make, self._begun),
            batch_size=None,
            compute=ActorPoolStrategy(
                size=len(self._places.nodes),
                max_tasks_in_flight_per_actor=2 * self._n_at_work if self._n_at_work > 1 else 1,
                max_concurrent_calls_per_actor=self._n_at_work,
            ),
            num_cpus=1,
            memory=self._places.needed,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._places.group),
            max_restarts=-1,  # a worker that ended is replaced on its node,
            max_task_retries=0,  # but what it had goes to others, as the node may be gone
        )


def _here() -> NodeAffinitySchedulingStrategy:
    """On this node, where the items are."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Ray Data's settings for blocks of one row, of which some get lost."""
    context = DataContext.get_current()
    wanted = {
        "max_errored_blocks": -1,
        "target_max_block_size": 1,
        "target_min_block_size": 1,
        "enable_progress_bars": False,
    }
    before = {name: getattr(context, name) for name in wanted}
    detectors, context.issue_detectors_config.detectors = context.issue_detectors_config.detectors, []
    # It logs a node that died for each of its tasks. Ray Data sets the level of its own when it is first used.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    for name, value in wanted.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        context.issue_detectors_config.detectors = detectors
        for name, value in before.items():
            setattr(context, name, value)
