"""Progress for a person: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from harness.log import say
from harness.units import format_seconds

QUIET_SECONDS = 10.0


class Display:
    """Shows loss, speed and time left.

    Args:
        total_steps: steps of the run.
        done: steps that were done before.
    """

    def __init__(self, total_steps: int, *, done: int):
        self.total, self.first = total_steps, done
        self._first_s = 0.0
        self._spoke = 0.0
        self._bar: Any = None
        if sys.stdout.isatty():
            self._bar = _bar(total_steps, done)

    def step(self, step: int, values: dict[str, float]) -> None:
        """Take in one step."""
        text = f"loss {values['train/loss']:.4f}  {values['speed/tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, numbers=text)
            return
        now = time.monotonic()
        if step == self.first + 1:
            self._first_s = now  # the first step, and what was before it, tell nothing of the others
        if now - self._spoke >= QUIET_SECONDS or step == self.total or step == self.first + 1:
            self._spoke = now
            done, ahead = step - self.first - 1, self.total - step
            left = f"  {format_seconds((now - self._first_s) / done * ahead)} left" if done > 0 and ahead > 0 else ""
            say(f"step {step}/{self.total}  {text}{left}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _bar(total_steps: int, done: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"), TimeRemainingColumn())
    bar.add_task("training", total=total_steps, completed=done, numbers="")
    bar.start()
    return bar
