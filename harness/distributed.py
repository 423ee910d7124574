"""The one file that talks to torch.distributed: start, agree, and end together."""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from harness import shared_memory
from harness import world as worlds
from harness.errors import Failure, PeerLost, Refused
from harness.heartbeat import mark
from harness.world import World

TURN_S = 1.0

_timeout: timedelta | None = None
"""Longest wait in a collective, also of the groups that are made later."""


def init(world: World, *, use_gpu: bool, timeout_minutes: float) -> torch.device:
    """Meet the other ranks.

    Args:
        world: this rank's place; the environment must hold MASTER_ADDR and MASTER_PORT when there are several ranks.
        use_gpu: train on the GPU of this local rank over NCCL, else on the CPU over gloo.
        timeout_minutes: longest wait in a collective.

    Returns:
        the device of this rank.

    Raises:
        Refused: when the launcher does not say which GPU is this rank's.
        Failure: when another number of ranks met than the launcher named.
        PeerLost: when the others did not come in time.
    """
    import deepspeed

    global _timeout
    _timeout = timedelta(minutes=timeout_minutes)
    if use_gpu and not world.is_placed:
        raise Refused(
            f"Which of its host's ranks rank {world.rank} of {world.size} is, the launcher does not say, so that all would take the first GPU.",
            where="the environment", remedy="Use `harness launch`, deepspeed, torchrun, mpirun or srun, or set LOCAL_RANK for every rank.",
        )
    if world.size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.update(worlds.meeting_place())
    if "MASTER_ADDR" in os.environ:  # else DeepSpeed asks MPI where the ranks meet
        for key, value in (("RANK", world.rank), ("WORLD_SIZE", world.size), ("LOCAL_RANK", world.local_rank), ("LOCAL_SIZE", world.local_size)):
            os.environ.setdefault(key, str(value))
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = "0" if world.size == 1 else "29500"
    device = torch.device("cuda", world.local_rank % torch.cuda.device_count()) if use_gpu else torch.device("cpu")  # each may see its own GPU alone
    if use_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        started = time.monotonic()
        try:
            deepspeed.init_distributed(
                dist_backend="nccl" if use_gpu else "gloo", timeout=_timeout, verbose=False, distributed_port=int(os.environ["MASTER_PORT"])
            )
        except RuntimeError as error:
            if world.size == 1 or not _speaks_of_peers(error):
                raise
            raise PeerLost(_why_apart(world, error, time.monotonic() - started)) from error
        deepspeed.comm.comm.cdb.new_group = new_group  # DeepSpeed's own has torch's timeout, in every group that it makes
        if not use_gpu:
            _forget_shared_memory()
    if size() != world.size:
        raise Failure(f"{world.size} ranks were launched, but {size()} met.")
    if use_gpu:
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed's word for the device
    return device


def _why_apart(world: World, error: RuntimeError, seconds: float) -> str:
    where = f"{os.environ.get('MASTER_ADDR', 'the host of rank 0')}:{os.environ['MASTER_PORT']} within {seconds:.0f} s (engine.timeout_minutes)"
    if came := re.search(r"(\d+)/\d+ clients joined", str(error)):
        return f"Of {world.size} ranks only {came[1]} came to {where}."
    return f"Rank {world.rank} did not meet the other {world.size - 1} at {where}: {str(error).splitlines()[0]}"


def _forget_shared_memory() -> None:
    """Once all ranks have mapped the segments; where one dies before, its starter does this."""
    barrier()
    shared_memory.forget(master=os.environ["MASTER_ADDR"], port=os.environ["MASTER_PORT"], ranks=[rank()])


def is_initialized() -> bool:
    """Whether the ranks have met."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This rank; 0 before the ranks have met."""
    return dist.get_rank() if is_initialized() else 0


def size() -> int:
    """The number of ranks; 1 before they have met."""
    return dist.get_world_size() if is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if size() > 1:
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor, *, wait: bool = True, group: Any = None) -> Any:
    """Sum `tensor` over all ranks, or those of `group`, in place; with `wait=False` returns a handle with `.wait()`, or None for one rank."""
    if size() == 1:
        return None
    return dist.all_reduce(tensor, op=dist.ReduceOp.SUM, async_op=not wait, group=group)


def send(tensor: torch.Tensor, to: int) -> None:
    """Give a tensor to another rank, which waits for it."""
    dist.send(tensor.contiguous(), to)


def receive(tensor: torch.Tensor, source: int) -> torch.Tensor:
    """Fill `tensor` with what another rank sends."""
    dist.recv(tensor, source)
    return tensor


def send_bytes(block: bytes, to: int) -> None:
    """Give a block to another rank, which waits for it in `receive_bytes`."""
    send(torch.frombuffer(bytearray(block), dtype=torch.uint8).to(_exchange_device()), to)


def receive_bytes(num_bytes: int, source: int) -> bytes:
    """A block of known length that another rank sends."""
    return receive(torch.empty(num_bytes, dtype=torch.uint8, device=_exchange_device()), source).cpu().numpy().tobytes()


def _exchange_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def new_group(ranks: list[int]) -> Any:
    """A group of some ranks; every rank must call this, in the same order."""
    return dist.new_group(ranks, timeout=_timeout)


def broadcast(tensor: torch.Tensor, source: int, *, group: Any = None) -> torch.Tensor:
    """Fill `tensor` on all ranks, or those of `group`, with that of rank `source`."""
    if size() > 1:
        dist.broadcast(tensor, source, group=group)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, by rank, on every rank."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def gather_on_main(value: Any) -> list[Any]:
    """The value of every rank, by rank, on rank 0; nothing on the others."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size() if rank() == 0 else []
    dist.gather_object(value, values or None)
    return values


def broadcast_object(value: Any, *, source: int = 0) -> Any:
    """The value of rank `source`, on every rank."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


@contextmanager
def together(phase: str) -> Iterator[None]:
    """Work that takes one rank as long as it takes, such as writing to a slow disk; it is over when all have done theirs. Collective.

    The work enters no collective. Those who are through wait in one reduction after another of about a second each, so that the longest
    wait in a collective does not bound it, and are seen to wait.

    Args:
        phase: of the heartbeat.
    """
    if size() == 1:
        yield
        return
    company = _Company(_exchange_device())
    company.start()
    try:
        yield
    except BaseException:
        company.leave()
        raise
    company.wait(phase)


class _Company(threading.Thread):
    """Tells the other ranks, about once a second, that this one still works, until none does."""

    def __init__(self, device: torch.device):
        super().__init__(name="together", daemon=True)
        self._device, self._is_done, self._has_left = device, threading.Event(), False
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream(self._device)) if self._device.type == "cuda" else nullcontext():
                self._keep()
        except Exception as error:
            self._error = error

    def _keep(self) -> None:
        working = 1.0
        while working:
            own = torch.tensor(float(not self._is_done.wait(TURN_S)), device=self._device)
            if self._has_left:
                return
            dist.all_reduce(own)
            working = own.item()

    def wait(self, phase: str) -> None:
        """Until all ranks are done."""
        self._is_done.set()
        while self.is_alive():
            mark(phase)
            self.join(TURN_S)
        if self._error is not None:
            raise self._error

    def leave(self) -> None:
        """After an exception: enter no further reduction."""
        self._has_left = True
        self._is_done.set()
        self.join(2 * TURN_S)


_LOST = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "timeout", "gloo/transport", "remote process exited")
"""What gloo, NCCL and the store say, in any case of letters, when a peer or the way to it is gone."""
_OWN_PORT = "server socket has failed to listen"
"""What the store says of a port that another program has: no peer's doing, and no better at the next start."""


def is_peer_lost(error: BaseException) -> bool:
    """Whether an exception means that another rank is gone, rather than that this one did something wrong."""
    return size() > 1 and isinstance(error, RuntimeError) and _speaks_of_peers(error)


def _speaks_of_peers(error: RuntimeError) -> bool:
    text = str(error).lower()
    return (isinstance(error, dist.DistError) and _OWN_PORT not in text) or any(words in text for words in _LOST)


def shutdown() -> None:
    """Leave together: scripts that end right after a collective die of an exception in a thread now and then."""
    if is_initialized():
        barrier()
        dist.destroy_process_group()


def abandon(code: int) -> None:
    """Leave after an exception, without entering a collective.

    A group over NCCL waits for its other ranks when it is taken down (pytorch PR 119250), so there it is left as it is, and the process ends
    with `code`, which is to be its exit code anyway, before the interpreter takes anything down.
    """
    if not is_initialized():
        return
    if dist.get_backend() == "nccl" and size() > 1:
        atexit.register(_end, code)
    else:
        dist.destroy_process_group()


def _end(code: int) -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
