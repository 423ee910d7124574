"""Whether a resumed run is the run that was saved: what is kept of it with each checkpoint, and held against it afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import distributed
from harness.checkpoint import certificate
from harness.config.schema import RunFile
from harness.data.loader import eval_batches
from harness.data.passed import Passed
from harness.data.rows import RowTable
from harness.data.sets import RunData
from harness.errors import CheckFailed, HarnessError
from harness.formats.certificate import Certificate, Group, NextRows, Probe
from harness.heartbeat import alive, mark
from harness.log import say
from harness.train.evaluate import evaluate
from harness.train.schedule import Schedule
from harness.world import Grid

if TYPE_CHECKING:
    from harness.engine.common import CommonEngine
    from harness.formats.manifest import Manifest
    from harness.train.progress import Progress

PROBE_ROWS = 2


@dataclass(frozen=True)
class Witness:
    """Sees the parts of a run that a certificate speaks of.

    Args:
        run: the run file.
        engine: the engine.
        data: what is trained on; while some of it is still being prepared, rows and probe are left out.
        grid: this rank's place.
        batch_rows: rows of a global batch.
    """

    run: RunFile
    engine: CommonEngine
    data: RunData
    grid: Grid
    batch_rows: int

    def facts(self, progress: Progress, *, probe: bool = True) -> dict[str, Any]:
        """What a certificate holds beside the tensors, the probe's forward pass only where it is asked for. Collective."""
        whole = distributed.broadcast_object(self.data.is_whole)
        rows = self.rows(self.order(), progress, count=2 * self.batch_rows) if whole and self.grid.rank == 0 else None
        probed = self.probe() if whole and probe else None
        mark("save")
        return {"groups": self.groups(), "rows": rows, "probe": probed}

    def check(self, found: tuple[Path, Manifest], progress: Progress, *, order: Any, schedule: Schedule) -> None:
        """Compare what was loaded with what was saved. Collective.

        Args:
            found: the checkpoint that was loaded.
            progress: where it stood.
            order: in which rows will be trained.
            schedule: of the learning rate.

        Raises:
            CheckFailed: on all ranks, with what differs.
        """
        folder, manifest = found
        if manifest.certificate is None:
            say(f"{folder.name} has no certificate, being of an earlier version: what was loaded is not compared with what was saved.")
            return
        problems = distributed.broadcast_object(self._problems(manifest, manifest.certificate, progress, order, schedule))
        if problems:
            raise CheckFailed(
                f"What was loaded from {folder.name} is not what was saved, so the run would not go on as it was:\n  " + "\n  ".join(problems)
                + f"\n  where:  {folder}\n  remedy: `harness verify {self.run.run_dir}` tells whether the files are at fault; "
                "rename the folder to resume from the one before."
            )
        say(f"What was loaded is what was saved: {len(manifest.certificate.tensors)} parameters and their moments, bit for bit.")

    def _problems(self, manifest: Manifest, saved: Certificate, progress: Progress, order: Any, schedule: Schedule) -> list[str]:
        """The same on all ranks but for the rows, which rank 0 knows."""
        unchanged = self._unchanged(manifest)
        tensors, adam_step = self.tensors()
        problems = certificate.tensor_problems(saved, tensors, adam_step=adam_step)
        problems += certificate.group_problems(saved.groups, self.groups(), keys=[key for key in certificate.HYPER if key in unchanged])
        if "schedule" in unchanged and saved.groups and saved.groups[0].lr != (lr := schedule.lr(progress.step)):
            problems.append(f"the learning rate of step {progress.step} would be {lr!r} instead of {saved.groups[0].lr!r}")
        whole = distributed.broadcast_object(self.data.is_whole)
        same_rows = "order" in unchanged and progress.passed == manifest.state.get("passed", [])
        if whole and saved.rows is not None and same_rows and self.grid.rank == 0:
            problems += certificate.row_problems(saved.rows, self.rows(order, progress, count=saved.rows.count))
        if whole and saved.probe is not None:
            problems += certificate.probe_problems(saved.probe, self.probe(), precision=self.run.train.precision)
        return problems

    def _unchanged(self, manifest: Manifest) -> set[str]:
        """Of what may be set anew between attempts, that which was not."""
        before, now = manifest.run_file, self.run.model_dump(mode="json")
        if not before:
            return set()
        same = {key for key in certificate.HYPER if before["optimizer"].get(key) == now["optimizer"][key]}
        by_step = now["train"]["steps"] is not None and now["optimizer"]["warmup_epochs"] is None
        if by_step and before["optimizer"] == now["optimizer"] and before["train"]["steps"] == now["train"]["steps"]:
            same.add("schedule")
        seed_and_window = [(told["train"]["seed"], told["data"].get("window_shards")) for told in (before, now)]
        if manifest.data_fingerprint == self.data.train.fingerprint and seed_and_window[0] == seed_and_window[1]:
            same.add("order")
        return same

    def tensors(self) -> tuple[dict[str, Any], int]:
        """Seals of all masters and moments, and Adam's step count. Collective."""
        sums, adam_step = {}, 0
        for group in self.engine.named_slices():
            alive()
            sums, adam_step = certificate.add([sums, certificate.sums_of_group(group)]), max(adam_step, group.adam_step)
        answers = distributed.gather_objects((sums, adam_step))
        return certificate.seals(certificate.add(part for part, _ in answers)), max(step for _, step in answers)

    def groups(self) -> tuple[Group, ...]:
        """Hyper-parameters in force. Collective."""
        return certificate.groups_of(distributed.gather_objects(self.engine.hyper_parameters()))

    def order(self) -> Any:
        """The order of training, from the index alone and apart from what the loader's thread works with; the data must be whole."""
        table, settings = self.data.train, {"seed": self.run.train.seed, "window_shards": self.run.data.window_shards}
        return RowTable.order(table, **settings) if isinstance(table, RowTable) else table.order(**settings)

    def rows(self, order: Any, progress: Progress, *, count: int) -> NextRows:
        """The rows that come next."""
        return certificate.next_rows(order, first=progress.rows, count=count, begin=progress.first_row, passed=Passed.of(progress.passed))

    def probe(self) -> Probe:
        """The loss on the first rows of the first validation set, one at a time, for training stands still meanwhile. Collective."""
        table = next(iter(self.data.validation.values()))
        errors: list[HarnessError] = []
        batches = eval_batches(table, dp_rank=self.grid.dp_rank, dp_size=self.grid.dp_size, micro_batch=1, errors=errors, num_rows=PROBE_ROWS)
        answer = evaluate(self.engine, {"": batches}, errors)
        return Probe(
            data_fingerprint=table.fingerprint, rows=min(PROBE_ROWS, table.num_rows), tokens=answer.tokens, loss=answer.loss,
            device=_device(self.engine),
        )


def _device(engine: CommonEngine) -> str:
    import torch

    return torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else engine.device.type
