"""Who makes the shards: this process, processes of this machine, or the ranks of an MPI job; the bytes are the same."""

from __future__ import annotations

import os
import queue
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process, set_start_method
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from harness.cgroup import cores

TOKENIZER_THREADS = "FASTOKENS_BPE_THREADS"
THREADS = ("RAYON_NUM_THREADS", TOKENIZER_THREADS, "OMP_NUM_THREADS", "ARROW_NUM_THREADS")
MPI_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")


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
def local_processes(processes: int) -> Iterator[Pool]:
    """Processes of this machine that share its cores."""
    with _threads(THREADS, cores() // processes), Pool(processes) as pool:  # read by a child when it starts
        yield pool


@contextmanager
def local_threads() -> Iterator[Executor | None]:
    """Two threads, of which one tokenises while the other holds the interpreter's lock; None where there is one core."""
    if cores() == 1:
        yield None
        return
    with _threads((TOKENIZER_THREADS,), cores() // 2), ThreadPoolExecutor(2, thread_name_prefix="harness-shard") as pool:
        yield pool


@contextmanager
def _threads(names: tuple[str, ...], count: int) -> Iterator[None]:
    """Environment variables that say how many threads a library uses, for a while."""
    kept = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(max(1, count))))
    try:
        yield
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class Pool(Executor):
    """Processes of this machine, each at the other end of a pipe.

    Those of the standard library share semaphores, whose names stay in /dev/shm when all processes are killed at once.

    Args:
        processes: how many.
    """

    def __init__(self, processes: int):
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="harness-worker")
        self._workers = [_start() for _ in range(processes)]
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._is_broken = False
        for _, pipe in self._workers:
            self._idle.put(pipe)

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        """Call a function, which a module must hold by its name, in the next process that is free."""
        return self._threads.submit(self._call, (function, args, options))

    def everywhere(self, function: Callable[..., Any], /, *args: Any) -> None:
        """Call a function in every process, for what it leaves there; nobody waits for it."""
        for _ in self._workers:  # the process that has been idle longest is next, so that none is given two
            self.submit(function, *args)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes, once they have done what they were given."""
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        for process, pipe in self._workers:
            pipe.close()
            process.join()

    def _call(self, job: tuple[Any, ...]) -> Any:
        pipe = self._idle.get()
        try:
            if self._is_broken:
                raise EOFError
            pipe.send(job)
            is_done, answer = pipe.recv()
        except (EOFError, OSError):
            self._is_broken = True
            raise BrokenProcessPool("A process of the pool was killed.") from None
        finally:
            self._idle.put(pipe)
        if not is_done:
            raise answer
        return answer


def _start() -> tuple[BaseProcess, Connection]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(pipe: Connection) -> None:
    """In a process of the pool: do what comes, until the other end is closed."""
    set_start_method("fork", force=True)  # what libraries share by habit, such as a lock around progress bars, then has no name that could stay
    _end_with_parent()
    with suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            function, args, options = pipe.recv()
            try:
                answer = True, function(*args, **options)
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = False, error
            pipe.send(answer)
    os._exit(0)  # nothing is left to do, and taking down tokenizers and libraries takes a tenth of a second


def _end_with_parent() -> None:
    """End this worker when its parent was killed, also in the middle of a job."""

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
