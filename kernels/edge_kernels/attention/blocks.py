"""How attention is split into tasks: blocks of queries and blocks of keys, sequence by sequence.

sequence 0                 sequence 1
queries  keys              queries  keys
┌────┐   ┌────┐ block 0    ┌────┐   ┌────┐ block 2       A task is one head and one block of queries of a
│ 0  │   ├────┤            │ 2  │   └────┘               sequence; it meets all blocks of that sequence's keys.
├────┤   │    │ block 1    └────┘
│ 1  │   └────┘
└────┘
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

TASKS_PER_WORKER = 4  # blocks of queries are cut until there are this many, so that no worker waits long for the last
TASK = 5
"""Numbers of a row of `Plan.queries`."""


class Operands(NamedTuple):
    """Queries, keys and values of all heads, flat, each with the distance of its rows."""

    q: Float32
    q_stride: int
    k: Float32
    k_stride: int
    v: Float32
    v_stride: int


class Plan(NamedTuple):
    """Blocks of queries and of keys.

    Attributes
    ----------
    queries : ndarray [shape=(blocks · 5,), int64]
        First query, queries, first key of the sequence, its keys, its first block of keys.
    keys : ndarray [shape=(blocks · 2,), int64]
        First key, keys.
    query_block : int
        Queries of the largest block, in whole panels.
    """

    queries: Int64
    keys: Int64
    query_block: int


def plan(
    q_offsets: Int64, kv_offsets: Int64, heads: int, workers: int, *, panel: int, most: int, key_block: int
) -> Plan:
    """Cut queries and keys into blocks; sequences without queries or keys have none.

    Blocks of queries are as large as fits the caches, but small enough to keep all workers busy. Rows do not depend
    on their block; blocks of keys have a fixed size, as it decides the order of summation.

    Parameters
    ----------
    q_offsets, kv_offsets : ndarray [shape=(S+1,), int64]
        First row of each sequence, and the number of rows at the end.
    panel, most : int
        Queries of a panel, and the most of a block (whole panels).
    key_block : int
        Keys of a block.
    """
    total = int(q_offsets[-1] - q_offsets[0])
    wanted = -(-total * heads // (TASKS_PER_WORKER * workers))
    query_block = min(most, max(panel, -(-wanted // panel) * panel))
    keys: list[tuple[int, int]] = []
    queries: list[tuple[int, int, int, int, int]] = []
    for s in range(len(q_offsets) - 1):
        start, stop = int(q_offsets[s]), int(q_offsets[s + 1])
        kv_start, kv_stop = int(kv_offsets[s]), int(kv_offsets[s + 1])
        if start == stop or kv_start == kv_stop:
            continue
        sequence = (kv_start, kv_stop - kv_start, len(keys))
        queries += [(first, min(query_block, stop - first), *sequence) for first in range(start, stop, query_block)]
        keys += [(first, min(key_block, kv_stop - first)) for first in range(kv_start, kv_stop, key_block)]
    return Plan(np.array(queries, np.int64).reshape(-1), np.array(keys, np.int64).reshape(-1), query_block)
