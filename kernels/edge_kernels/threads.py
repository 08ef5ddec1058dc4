"""How many threads kernels run on, and the only entry to parallel code.

What enters: a number of threads. What leaves: `parallel_region`, inside which kernels are called, one call at a time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edge_kernels.machine import cpu_count, processor_count
from edge_kernels.waiting import spin_briefly

# omp first: numba's own workqueue layer aborts the process when two Python threads are inside parallel code
# at the same time (numba issue 8563), and OpenMP idles between calls instead of being torn down. workqueue is
# the fallback that always exists (macOS wheels have no OpenMP). A layer that the user chose in the environment
# is left alone. OpenMP's one limit: a process that has run a kernel must not fork() and run kernels in the
# child; spawn instead.
if "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
spin_briefly()

_threads: int | None = None  # None: cpu_count() at the first use
_one_at_a_time = threading.RLock()


def set_threads(n: int | None) -> None:
    """Set the number of threads kernels run on; None returns to `cpu_count()`.

    Raises
    ------
    ValueError
        If n is below 1, or above what numba was started with (NUMBA_NUM_THREADS, by default the logical CPUs
        allowed).
    """
    global _threads
    most = int(numba.config.NUMBA_NUM_THREADS)
    if n is not None and not 1 <= n <= most:
        raise ValueError(
            f"{n} threads were asked for; 1 to {most} are possible here. Set NUMBA_NUM_THREADS for more."
        )
    _threads = n


def thread_limit() -> int:
    """Return the number of threads above which more would only wait for each other, or cannot be had."""
    return max(1, min(processor_count(), int(numba.config.NUMBA_NUM_THREADS)))


def thread_count() -> int:
    """Return the number of threads kernels run on."""
    global _threads
    if _threads is None:
        _threads = max(1, min(cpu_count(), int(numba.config.NUMBA_NUM_THREADS)))
    return _threads


@contextmanager
def parallel_region() -> Iterator[int]:
    """Enter parallel code; yield the number of workers to pass to the kernel.

    One thread at a time: a second caller waits. Under the workqueue layer this keeps the process alive; under
    OpenMP it keeps two calls from sharing the cores, which is slower than one after the other. Other packages'
    parallel numba code in another thread is not covered. The caller's own numba thread count is restored
    afterwards.
    """
    with _one_at_a_time:
        before = numba.get_num_threads()
        workers = thread_count()
        numba.set_num_threads(workers)
        try:
            yield workers
        finally:
            numba.set_num_threads(before)


def start_threads() -> str:
    """Start numba's threads, which compiled callbacks cannot; return the name of the thread layer."""
    from numba.np.ufunc.parallel import _launch_threads

    _launch_threads()
    return str(numba.threading_layer())


@intrinsic
def exchange_threads(typing_context, n):  # type: ignore[no-untyped-def]
    """Set the number of threads of the calling thread's parallel code to n; return what it was.

    As `numba.set_num_threads`, whose code cannot be cached: it holds the function's address. LLVM knows its name.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        number = ir.IntType(32)
        read = cgutils.get_or_insert_function(builder.module, ir.FunctionType(number, []), "get_num_threads")
        write = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [number]), "set_num_threads"
        )
        before = builder.call(read, [])
        builder.call(write, [builder.trunc(args[0], number)])
        return builder.sext(before, ir.IntType(64))

    return types.int64(types.int64), generate
