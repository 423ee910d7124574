"""How far the preparation is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

EVERY_S = 15.0


class Progress:
    """Shards that are done, and the tokens in them.

    Args:
        total: shards in all.
        label: what is done to them.
        shown: nothing is shown otherwise.
    """

    def __init__(self, total: int, label: str, *, shown: bool):
        self.total, self.label, self.shown = total, label, shown
        self.done = self.tokens = 0
        self.started = self._told = time.monotonic()
        console = Console()
        self._bar: Any = None
        if shown and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("shards, {task.fields[speed]}"), TimeRemainingColumn())
            self._bar = Bar(*columns, console=console)
            self._task = self._bar.add_task(label, total=total, speed="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        if self.shown and kind is None and (not self._bar):
            self._tell()

    def advance(self, tokens: int) -> None:
        """One more shard, with so many tokens."""
        self.done, self.tokens = self.done + 1, self.tokens + tokens
        if self._bar:
            self._bar.update(self._task, advance=1, speed=self._speed())
        elif self.shown and time.monotonic() - self._told >= EVERY_S and self.done < self.total:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        print(f"{self.label}: {self.done} of {self.total} shards, {self._speed()}", flush=True)

    def _speed(self) -> str:
        return f"{self.tokens:,} tokens, {self.tokens / max(time.monotonic() - self.started, 1e-3):,.0f} tokens/s"
