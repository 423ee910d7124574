"""Where a run's numbers go: JSON Lines, TensorBoard and the terminal, on rank 0 alone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil

from harness.files import open_to_append
from harness.formats import metrics as table
from harness.heartbeat import spent
from harness.telemetry.display import Display

QUEUE_EVENTS = 1000
"""How many events may wait for a slow disk, to which TensorBoard's thread writes them, before training waits for it."""


class Recorder:
    """Fans out to every sink on rank 0; does nothing elsewhere.

    Args:
        run_dir: folder of the run.
        attempt: number of this attempt.
        resumed_step: step from which this attempt goes on; TensorBoard drops what lies beyond.
        total_steps: steps of the whole run.
    """

    def __init__(self, run_dir: Path, *, attempt: int, resumed_step: int, total_steps: int):
        self.attempt, self._folder = attempt, run_dir / "tensorboard"
        self._lines = open_to_append(run_dir / "metrics.jsonl")
        self._board = self._open_board(resumed_step + 1 if resumed_step else 0 if attempt > 1 else None)
        self._board.add_custom_scalars(table.CHARTS)
        self._display = Display(total_steps, done=resumed_step)
        self._process = psutil.Process()
        self._told_s: dict[str, float] = {}

    @classmethod
    def open(cls, run_dir: Path, *, attempt: int, main: bool, resumed_step: int, total_steps: int) -> Recorder | Silence:
        """A recorder on the main rank, silence on the others."""
        return cls(run_dir, attempt=attempt, resumed_step=resumed_step, total_steps=total_steps) if main else Silence()

    def _open_board(self, purge_step: int | None) -> Any:
        """What earlier files say of `purge_step` and later ones is dropped."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=purge_step, max_queue=QUEUE_EVENTS)

    def go_back(self, step: int, *, from_step: int, total_steps: int) -> None:
        """Steps after `step`, up to `from_step`, were taken back: readers leave them out until they are done again."""
        self._lines.write(json.dumps({"attempt": self.attempt, "step": step, "time": time.time(), "rolled_back_from": from_step}) + "\n")
        self._lines.flush()
        self._board.close()
        self._board = self._open_board(step + 1)
        self._display.total = total_steps

    def hyper_parameters(self, values: dict[str, Any]) -> None:
        """The run file's leaves, as a table."""
        rows = "\n".join(f"| {key} | {value} |" for key, value in values.items())
        self._board.add_text("run file", f"| setting | value |\n| --- | --- |\n{rows}", 0)

    def step(self, step: int, values: dict[str, float], *, rows: int) -> None:
        """One optimizer step."""
        values = values | self._memory()
        self._write(step, values, rows=rows)
        self._display.step(step, values)

    def evaluation(self, step: int, values: dict[str, float], *, rows: int) -> None:
        """One evaluation."""
        self._write(step, values, rows=rows)

    def extra(self, step: int, values: dict[str, float]) -> None:
        """Numbers that belong to no step of their own."""
        self._write(step, values, rows=None)

    def sample(self, step: int, prompt: str, answer: str) -> None:
        """A fixed prompt and its answer."""
        self._board.add_text(f"answers/{prompt}", answer or "(empty)", step)

    def close(self) -> None:
        """Flush and close every sink."""
        self._display.close()
        self._board.close()
        self._lines.close()

    def _write(self, step: int, values: dict[str, float], *, rows: int | None) -> None:
        entry: dict[str, Any] = {"attempt": self.attempt, "step": step, "time": time.time()}
        if rows is not None:
            entry["rows"] = rows
        for tag, value in values.items():
            entry[table.check(tag)] = value
        self._scalars(step, values)
        spent_s = spent()
        entry["phases"] = {phase: round(found, 3) for phase, seconds in spent_s.items() if (found := seconds - self._told_s.get(phase, 0.0)) > 0}
        self._told_s = spent_s
        self._lines.write(json.dumps(entry) + "\n")
        self._lines.flush()

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        """All in one event: the file is opened anew for each."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._board.file_writer.add_summary(summary, step)

    def _memory(self) -> dict[str, float]:
        import torch

        values = {"memory/host_bytes": float(self._process.memory_info().rss)}
        if torch.cuda.is_available():
            values["memory/device_peak_bytes"] = float(torch.cuda.max_memory_allocated())
        return values


class Silence:
    """The recorder of all ranks but the first."""

    def __getattr__(self, name: str) -> Any:
        return _ignore


def _ignore(*_: Any, **__: Any) -> None:
    return None
