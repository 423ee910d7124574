"""Back to the last checkpoint in the same process, on all ranks together, without the rows of a step that was a spike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.checkpoint import fetch
from harness.checkpoint.disks import Disks
from harness.data.passed import Passed
from harness.errors import AnomalyStop
from harness.heartbeat import alive
from harness.log import say
from harness.train.progress import Progress

if TYPE_CHECKING:
    import torch

    from harness.engine.common import CommonEngine
    from harness.formats.manifest import Manifest
    from harness.telemetry.recorder import Recorder
    from harness.train.certify import Witness
    from harness.train.course import Course
    from harness.train.opened import OpenStep


def load(engine: CommonEngine, found: tuple[Path, Manifest], disks: Disks) -> Progress:
    """Put a checkpoint into an engine, fresh or trained, and bring files to the disks that lack them. Collective.

    Returns:
        where the run stood.
    """
    manifest = found[1]
    with fetch.reading(found, engine.held_slices(), disks) as reader:

        def read(*part: Any) -> torch.Tensor:
            alive()
            return reader.read(*part)

        engine.load_slices(read, step=manifest.adam_step)
        engine.load_buffers(reader.buffers(), where=str(found[0]))
    engine.restore_loss_scale(manifest.loss_scale)
    return Progress.from_state(manifest.state)


@dataclass(frozen=True)
class WayBack:
    """What a rollback needs.

    Attributes:
        engine: the engine.
        disks: which ranks share the run's folder.
        newest: the newest checkpoint that holds, the same on all ranks; collective.
        ahead: the course from a place in the run.
        witness: of what was loaded.
        recorder: of the run's numbers.
        note: into the ledger.
    """

    engine: CommonEngine
    disks: Disks
    newest: Callable[[], tuple[Path, Manifest] | None]
    ahead: Callable[[Progress], Course]
    witness: Witness
    recorder: Recorder
    note: Callable[..., None]

    def __call__(self, progress: Progress, course: Course, spike: OpenStep) -> tuple[Progress, Course]:
        """Take the run back to the last checkpoint and leave the rows of a step out from there on. Collective.

        Args:
            progress: where the run stands, at the step of the spike or the one after.
            course: that it is on; its loader is closed.
            spike: the step.

        Raises:
            AnomalyStop: on all ranks, when there is no checkpoint to go back to.
            CheckFailed: on all ranks, when what was loaded is not what was saved.
        """
        started, found = time.perf_counter(), self.newest()
        rows = (spike.first_row, spike.rows)
        if found is None or found[1].step >= spike.step or found[1].rows_consumed < progress.first_row:
            raise AnomalyStop(f"Step {spike.step} was a spike, and there is no checkpoint before it to roll back to. Its rows are {rows[0]:,} to {rows[1] - 1:,}.")
        course.loader.close(timeout_s=None)
        before = load(self.engine, found, self.disks)
        passed = [list(pair) for pair in Passed.of(progress.passed).and_(*rows).ranges]
        back = replace(before, first_row=progress.first_row, passed=passed, rollbacks=progress.rollbacks + 1)
        ahead = self.ahead(back)
        self.witness.check(found, back, order=ahead.loader.order, schedule=ahead.schedule)
        self.recorder.go_back(back.step, from_step=progress.step, total_steps=ahead.total_steps)
        seconds = time.perf_counter() - started
        self.note("rollback", step=spike.step, to=back.step, rows=list(rows), seconds=round(seconds, 3))
        say(f"Rolled back to {found[0].name} in {seconds:.1f} s; {rows[1] - rows[0]} rows are passed over from now on.")
        return back, ahead
