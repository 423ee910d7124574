"""What lies ahead of a run: how long it is, the learning rate of every step, and the rows, from where it stands now."""

from __future__ import annotations

import math
from dataclasses import dataclass

from harness.config.batch import BatchEquation
from harness.config.schema import RunFile
from harness.data.loader import TrainLoader
from harness.data.mixture import MixedTable
from harness.data.passed import Passed
from harness.data.rows import RowTable
from harness.errors import AnomalyStop
from harness.train.progress import Progress
from harness.train.schedule import Schedule
from harness.world import Grid


@dataclass(frozen=True)
class Length:
    """How long a run is.

    Attributes:
        steps: optimizer steps in all, those done included.
        total_rows: rows after which only empty ones follow, or None when the run is counted in steps.
    """

    steps: int
    total_rows: int | None


def run_length(run: RunFile, *, rows_per_epoch: int, batch_rows: int, done: Progress) -> Length:
    """The length of a run that may have been cut differently so far; rows that are passed over count as consumed."""
    if run.train.steps is not None:
        return Length(run.train.steps, None)
    total_rows = math.ceil(run.train.epochs * rows_per_epoch)
    left = Passed.of(done.passed).trained(done.rows, total_rows)
    return Length(done.step + math.ceil(left / batch_rows), total_rows)


def build_schedule(run: RunFile, *, steps: int, rows_per_epoch: int, batch_rows: int) -> Schedule:
    """The learning rate's course over `steps` optimizer steps; its fall begins after the warm-up."""
    settings = run.optimizer
    warmup = settings.warmup_steps or 0
    if settings.warmup_epochs is not None:
        warmup = math.ceil(settings.warmup_epochs * rows_per_epoch / batch_rows)
    decay = settings.decay_steps if settings.decay_steps is not None else max(1, steps // 10)
    return Schedule(settings.schedule, settings.lr, steps, warmup, min(decay, max(0, steps - warmup)), settings.min_lr_share)


@dataclass(frozen=True)
class Course:
    """From a place in a run to its end.

    Attributes:
        total_steps: optimizer steps of the whole run.
        schedule: of the learning rate.
        loader: of the rows that come next.
    """

    total_steps: int
    schedule: Schedule
    loader: TrainLoader

    @classmethod
    def ahead(cls, run: RunFile, table: RowTable | MixedTable, grid: Grid, batch: BatchEquation, progress: Progress, *, pinned: bool) -> Course:
        """The course from where a run stands.

        Raises:
            AnomalyStop: when the rows that were passed over leave too few.
        """
        rows_per_epoch, passed = table.num_rows if table.is_whole else 0, Passed.of(progress.passed)
        length = run_length(run, rows_per_epoch=rows_per_epoch, batch_rows=batch.rows, done=progress)
        order = table.order(seed=run.train.seed, window_shards=run.data.window_shards)
        there = getattr(order, "total_rows", None)
        wanted = (length.steps - progress.step) * batch.rows
        if passed.ranges and there is not None and run.train.steps is not None and passed.trained(progress.rows, progress.first_row + there) < wanted:
            raise AnomalyStop(f"All sets are used up before step {length.steps}, for the rows of {progress.rollbacks} spikes are passed over; the last checkpoint stands.")
        loader = TrainLoader(
            table, order, dp_rank=grid.dp_rank, dp_size=grid.dp_size, micro_batch=batch.micro_batch, global_rows=batch.rows, start=progress.rows,
            total_rows=length.total_rows, first_row=progress.first_row, passed=passed, pinned=pinned,
        )
        table.heed(loader.closed.is_set)
        return cls(length.steps, build_schedule(run, steps=length.steps, rows_per_epoch=rows_per_epoch, batch_rows=batch.rows), loader)
