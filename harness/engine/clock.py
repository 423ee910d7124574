"""When a rank worked within a step, on the clock of its device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WORK = ("forward", "backward")


class Clock:
    """The spans of one step: forwards, backwards and the update, which a trace shows by these names.

    On a GPU their ends are events on its stream; nothing waits for them before somebody asks for seconds.

    Args:
        device: where this rank computes.
    """

    def __init__(self, device: torch.device):
        self._uses_events = device.type == "cuda"
        self.start()

    def start(self) -> None:
        """The step begins; spans of the one before are forgotten."""
        self._started, self._spans = self._mark(), []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """What runs within is a forward, a backward or the update."""
        before = self._mark()
        with torch.profiler.record_function(name):
            yield
        self._spans.append((name, before, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Seconds by name of the spans of this step."""
        found: dict[str, float] = {}
        for name, before, after in self._spans:
            found[name] = found.get(name, 0.0) + self._between(before, after)
        return found

    def window_s(self) -> float:
        """Seconds from the start to the end of the last forward or backward."""
        last = next((after for name, _, after in reversed(self._spans) if name in WORK), None)
        return self._between(self._started, last) if last is not None else 0.0

    def _mark(self) -> Any:
        if not self._uses_events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, before: Any, after: Any) -> float:
        if not self._uses_events:
            return after - before
        after.synchronize()
        return before.elapsed_time(after) / 1000
