"""A trace of a few steps, when one is asked for: what ran on the CPU and on the GPU, when, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness.heartbeat import alive
from harness.log import say

STEPS = 3
_ROWS = 25


class Tracer:
    """Records the steps that follow a request, by torch's profiler.

    Two files come of it: a trace that https://ui.perfetto.dev and chrome://tracing open, and a table of the operators that took longest.

    Args:
        folder: for the files.
        rank: this one.
        takes_part: the others record nothing; one rank of each pipeline stage is enough.
        note: tells the ledger.
    """

    def __init__(self, folder: Path, *, rank: int, takes_part: bool, note: Callable[..., None]):
        self._folder, self._rank, self._takes_part, self._note = folder, rank, takes_part, note
        self._is_asked, self._first = False, 0
        self._profile: Any = None
        self._mark: Any = None

    def ask(self) -> None:
        """Record the steps after the one that is under way; while some are being recorded those are it."""
        self._is_asked = self._takes_part and self._profile is None

    def after_step(self, step: int) -> bool:
        """`step` is done: begin, go on or end; False when there is nothing to do."""
        if self._profile is None and not self._is_asked:
            return False
        try:
            if self._profile is None:
                self._begin(step + 1)
            elif step + 1 < self._first + STEPS:
                self._next(step + 1)
            else:
                self._end(step)
        except (OSError, RuntimeError) as error:
            self._give_up(f"the trace failed: {error}")
        return True

    def close(self) -> None:
        """Forget steps that were not recorded whole."""
        if self._profile is not None:
            self._give_up("the run ended before the trace was whole")

    def _begin(self, step: int) -> None:
        self._is_asked, self._first = False, step
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.start()
        self._next(step)

    def _next(self, step: int) -> None:
        """The trace tells the steps apart."""
        self._end_mark()
        self._mark = torch.profiler.record_function(f"step {step}")
        self._mark.__enter__()

    def _end_mark(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None

    def _end(self, last: int) -> None:
        profile = self._stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = f"step-{self._first:06d}-rank-{self._rank:05d}"
        path = self._folder / f"{stem}.pt.trace.json.gz"
        alive()
        profile.export_chrome_trace(str(path))
        alive()
        longest = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=longest, row_limit=_ROWS, max_name_column_width=60)
        (self._folder / f"{stem}.txt").write_text(table + "\n", encoding="utf-8")
        self._note("trace", first=self._first, last=last, path=str(path.relative_to(self._folder.parents[2])))
        say(f"Trace of steps {self._first} to {last}: {path}")

    def _stop(self) -> Any:
        self._end_mark()
        profile, self._profile = self._profile, None
        profile.stop()
        return profile

    def _give_up(self, why: str) -> None:
        if self._profile is not None:
            self._stop()
        say(f"step {self._first}: {why}")
