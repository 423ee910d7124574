"""A checkpoint that is written while training goes on: the copy of a rank's slices, and the thread that writes it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from harness.engine.holdings import SliceGroup
from harness.heartbeat import mark

MARK_S = 1.0
TOUCHED_ELEMENTS = 1 << 15
"""As many as torch fills without its pool of threads."""
NICENESS = 10
"""Of the thread that writes: on busy cores training goes first."""


class Snapshot:
    """Host memory for a copy of this rank's slices; it is kept from one save to the next, so that its pages are made once."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._is_given_up = False
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def reserve(self, lengths: list[int]) -> None:
        """Make the memory beforehand, in any thread; what cannot be had is left to `take`, which tells.

        Args:
            lengths: elements of all tensors of each group.
        """
        with contextlib.suppress(Exception), torch.cuda.device(self._device) if self._device is not None else contextlib.nullcontext():
            for number, length in enumerate(lengths):
                if self._is_given_up:
                    return
                self._buffer(number, length)

    def give_up(self) -> None:
        """Let `reserve` end soon: a thread that is within torch when the interpreter ends would abort the process."""
        self._is_given_up = True

    def take(self, groups: Iterable[SliceGroup]) -> list[SliceGroup]:
        """Copy every group; the copy before is overwritten.

        Args:
            groups: as an engine names them, on the device or in host memory.
        """
        copies = [self._copy(number, group) for number, group in enumerate(groups)]
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return copies

    def _copy(self, number: int, group: SliceGroup) -> SliceGroup:
        sources = [(kind, name, source) for kind, held in group.tensors.items() for name, source in held.items()]
        flat, used = self._buffer(number, sum(source.numel() for _, _, source in sources)), 0
        tensors: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in group.tensors}
        for kind, name, source in sources:
            tensors[kind][name] = flat.narrow(0, used, source.numel()).copy_(source, non_blocking=True)
            used += source.numel()
        return SliceGroup(group.slices, tensors, group.adam_step)

    def _buffer(self, number: int, length: int) -> torch.Tensor:
        if number == len(self._buffers):
            self._buffers.append(_host_memory(length))
        elif self._buffers[number].numel() < length:
            self._buffers[number] = _host_memory(length)
        return self._buffers[number]


def _host_memory(length: int) -> torch.Tensor:
    """fp32 memory, registered with the GPU where there is one; torch's own pinned memory would be rounded up to a power of two.

    It gets its pages a little at a time, so that one core does it and the interpreter's lock is soon free again.
    """
    memory = torch.empty(length, dtype=torch.float32)
    for part in memory.split(TOUCHED_ELEMENTS):
        part.zero_()
    if torch.cuda.is_initialized():
        torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    return memory


class Behind:
    """Something that a thread does while training goes on; it enters no collective, and dies with the process.

    Args:
        action: what is done; it must not raise.
    """

    def __init__(self, action: Callable[[], Any]):
        self._action, self._result = action, None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether it is over."""
        return not self._thread.is_alive()

    def result(self) -> Any:
        """What `action` gave; waits for it, and is seen to wait."""
        while self._thread.is_alive():
            mark("save")
            self._thread.join(MARK_S)
        return self._result

    def _run(self) -> None:
        started = time.perf_counter()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        self._result = self._action()
        self.seconds = time.perf_counter() - started
