"""Progress for a person: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from harness.log import say
from harness.units import format_bytes, format_seconds

QUIET_SECONDS = 10.0


class Display:
    """Shows loss, learning rate, gradient norm, speed, memory of the GPU and time left.

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
        text = _text(values)
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


def _text(values: dict[str, float]) -> str:
    """What a step tells of itself, the most important first: a narrow terminal cuts the end off."""
    forms: dict[str, Callable[[float], str]] = {
        "train/loss": "loss {:.4f}".format,
        "optim/lr": "lr {:.3g}".format,
        "optim/grad_norm": "gradient norm {:.3g}".format,
        "speed/tokens_per_second": "{:,.0f} tokens/s".format,
        "speed/mfu": "MFU {:.1%}".format,
        "memory/device_peak_bytes": lambda count: f"GPU {format_bytes(count)}",
    }
    return "  ".join(form(values[tag]) for tag, form in forms.items() if tag in values)


def _bar(total_steps: int, done: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(TextColumn("training"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"), TimeRemainingColumn())
    bar.add_task("training", total=total_steps, completed=done, numbers="")
    bar.start()
    return bar
