"""Who makes the shards: this process, processes of this machine, or the ranks of an MPI job; the bytes are the same."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any

THREADS = ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "ARROW_NUM_THREADS")
MPI_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def mpi_ranks() -> int:
    """Ranks of the MPI job that this process belongs to; 1 outside of one."""
    return max((int(os.environ[name]) for name in MPI_SIZE if os.environ.get(name, "").isdigit()), default=1)


@contextmanager
def mpi_executor() -> Iterator[Executor | None]:
    """The other ranks of an MPI job as workers of rank 0.

    Yields:
        an executor on rank 0; None on the others, once they have served.
    """
    from mpi4py import MPI
    from mpi4py.futures import MPICommExecutor

    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        yield executor


@contextmanager
def local_executor(processes: int) -> Iterator[Executor | None]:
    """Processes of this machine that share its cores, or None where one process does it all."""
    if processes <= 1:
        yield None
        return
    kept = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, str(max(1, cores() // processes))))  # read by a child when it starts
    try:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
            yield pool
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _end_with_parent() -> None:
    """End this worker when its parent was killed; it would wait for jobs for ever, as each worker holds the queue open for all of them."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end with parent").start()


def results(executor: Executor | None, function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Call `function` on every job.

    Yields:
        (number of the job, result), in the order in which they are done.

    Raises:
        BrokenProcessPool: when a worker process was killed; what `function` raised first, otherwise.
    """
    if executor is None:
        for number, job in enumerate(jobs):
            yield number, function(job)
        return
    futures = {executor.submit(function, job): number for number, job in enumerate(jobs)}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        for future in futures:
            future.cancel()
