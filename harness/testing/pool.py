"""Ranks for tests: processes of a forkserver that has torch, deepspeed and transformers loaded, many cases per process group."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOAD = ["torch", "deepspeed", "transformers", "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama", "harness.engine.zero"]
TIMEOUT_MINUTES = 3


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time; the message holds its traceback."""


class RankPool:
    """`size` ranks of one gloo group; a failure ends them all, and the next use starts new ones.

    Args:
        size: number of ranks.
    """

    def __init__(self, size: int):
        self.size = size
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
        """Call a module-level function on every rank, inside the process group.

        Returns:
            the results by rank.

        Raises:
            RankFailure: with the traceback of the first rank that failed.
        """
        self._start()
        for _, pipe in self._ranks:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < self.size:
            waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks) if rank not in results}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"ranks {sorted(waiting.values())} did not answer within {timeout} s; their stacks are on stderr", dump=True)
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    self._fail(f"rank {rank} died with exit code {self._ranks[rank][0].exitcode}")
                if not ok:
                    self._fail(f"rank {rank} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        """End the ranks."""
        for process, pipe in self._ranks:
            pipe.close()
            process.kill()
            process.join()
        self._ranks = []

    def _start(self) -> None:
        if self._ranks:
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, port, theirs, dict(os.environ)), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def _fail(self, text: str, *, dump: bool = False) -> None:
        if dump:
            for process, _ in self._ranks:
                os.kill(process.pid, signal.SIGUSR2)
            time.sleep(1.0)
        self.close()
        raise RankFailure(text)


def _serve(rank: int, size: int, port: int, pipe: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # locks that libraries make by habit then have no names that could be left behind
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    import torch

    from harness import distributed, world

    torch.set_num_threads(1)
    distributed.init(world.current(), use_gpu=False, timeout_minutes=TIMEOUT_MINUTES)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
