"""Requests to stop that are heard in the midst of long work: in an evaluation, between answers, while rows are waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from harness import distributed
from harness.heartbeat import alive

T = TypeVar("T")
EVERY_S = 1.0
POLL_S = 0.1


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """Raised on all ranks at the same place, because one of them was asked to stop."""


class Hearing:
    """What all ranks know of requests to stop, besides what they learn at the end of a step.

    Args:
        asked: whether this rank was asked.
        device: where the engine computes.
        asked_of_all: whether it would be asked if it were the rank that looks for requests in the run's folder.
    """

    def __init__(self, asked: Callable[[], bool], device: torch.device, asked_of_all: Callable[[], bool] | None = None):
        self.asked, self.device, self._asked_of_all = asked, device, asked_of_all or asked
        self._interruptible = False

    def now(self) -> bool:
        """Whether any rank was asked. Collective."""
        return self._sums(float(self.asked()))[0] > 0

    def gives_up(self) -> bool:
        """Whether this rank need not wait for anything: it was asked, within work that ends when it is."""
        return self._interruptible and self._asked_of_all()

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The same items, of which all ranks have equally many; the ranks agree about once a second, without waiting for each other.

        How many items pass in between follows from the time that all ranks took, so that it is the same on all of them.

        Raises:
            Interrupted: on all ranks before the same item.
        """
        pending, every, left, started = None, 1, 0, time.monotonic()
        self._interruptible = True
        try:
            for item in items:
                if not left:
                    stop, an_item_s = self._collect(*pending) if pending is not None else (0.0, 0.0)
                    if stop:
                        raise Interrupted
                    pending = self._offer(float(self.asked()), (time.monotonic() - started) / every / distributed.size())
                    every = max(1, min(2 * every, int(EVERY_S / max(an_item_s, 1e-6))))
                    left, started = every, time.monotonic()
                left -= 1
                yield item
            if pending is not None:
                self._collect(*pending)
        finally:
            self._interruptible = False

    def until_all(self, there: Callable[[float], bool]) -> bool:
        """Wait until something is there on all ranks. Collective; a turn takes about a second, and is a sign of life.

        Args:
            there: whether it is there on this rank within some seconds.

        Returns:
            False on all ranks, about a second after one of them was asked to stop.
        """
        while True:
            turn = time.monotonic() + EVERY_S
            while not (found := there(POLL_S)) and not self.asked() and time.monotonic() < turn:
                pass
            alive()
            missing, stop = self._sums(float(not found), float(self.asked()))  # asked last: what it was not there for may be a request
            if stop or not missing:
                return not stop

    def _offer(self, *values: float) -> tuple[torch.Tensor, Any]:
        packed = torch.tensor(values, dtype=torch.float64).to(self.device, non_blocking=True)
        return packed, distributed.all_reduce_sum(packed, wait=False)

    def _collect(self, packed: torch.Tensor, handle: Any) -> list[float]:
        if handle is not None:
            handle.wait()
        return packed.tolist()

    def _sums(self, *values: float) -> list[float]:
        return self._collect(*self._offer(*values))
