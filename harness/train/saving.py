"""When a checkpoint is copied, written behind the training, committed and given up: the one place of a run that knows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import distributed, memory
from harness.checkpoint import commit, shelf
from harness.checkpoint.background import Behind, Snapshot
from harness.checkpoint.disks import Disks
from harness.config.deepspeed import offload_device
from harness.config.schema import RunFile
from harness.errors import Failure
from harness.formats import ledger
from harness.formats.manifest import KINDS
from harness.heartbeat import mark
from harness.log import say
from harness.train.certify import Witness
from harness.units import format_bytes, format_seconds
from harness.world import World

if TYPE_CHECKING:
    import torch

    from harness.engine.common import CommonEngine
    from harness.engine.holdings import SliceGroup
    from harness.telemetry.recorder import Recorder
    from harness.train.progress import Progress

FREE_SHARE = 0.8
"""Of the memory that is available, what a copy of the state may take."""
MARGIN = 1.5
"""How much longer than the last one a save may take, where the time that is left is counted."""


@dataclass
class Flight:
    """A checkpoint on its way.

    Attributes:
        fields: of its manifest, as things stood when it began.
        best_step: of the best evaluation by then.
        buffers: of the model, as they were then.
        stall_s: seconds that training stood still for it so far.
        beside_s: seconds in which it was written while training went on, once it is.
        behind: the thread that writes this rank's part, or None when it is written.
        answer: what this rank wrote, once it is.
    """

    fields: dict[str, Any]
    best_step: int
    buffers: dict[str, torch.Tensor]
    stall_s: float = 0.0
    beside_s: float = 0.0
    behind: Behind | None = None
    answer: commit.Answer = (None, "")

    @property
    def step(self) -> int:
        """Of the checkpoint."""
        return self.fields["step"]


class Saver:
    """Commits checkpoints, one at a time, and keeps the ones that are to be kept.

    A save copies this rank's slices to host memory, and a thread writes them while training goes on. The ranks learn at a later
    step, from the reduction that they do anyway, that all have written, and commit together. Every rank calls the same methods.

    Args:
        run: the run file.
        engine: between two steps whenever a method is called.
        witness: gives the certificate.
        world: this rank's place.
        disks: which ranks share the run's folder.
        recorder: gets the seconds.
        ds_config: the merged configuration.
        attempt: number of this start of the run.
        stands: step of the checkpoint that this attempt began from, 0 when there was none.
    """

    def __init__(
        self, run: RunFile, engine: CommonEngine, witness: Witness, world: World, disks: Disks, recorder: Recorder,
        ds_config: dict[str, Any], *, attempt: int, stands: int,
    ):
        self.run, self.engine, self.witness, self.world, self.recorder = run, engine, witness, world, recorder
        self.disks, self.ds_config, self.attempt, self.stands = disks, ds_config, attempt, stands
        self.saved_at = time.monotonic()
        self._flight: Flight | None = None
        self._snapshot = Snapshot()
        self._reserving: Behind | None = None
        self._fits: bool | None = None
        self._cleaning: Behind | None = None
        self._last_cost_s = 0.0

    @property
    def writing(self) -> bool:
        """Whether this rank's thread still writes."""
        return self._flight is not None and self._flight.behind is not None and not self._flight.behind.is_done

    def get_ready(self) -> None:
        """Make the memory for copies while training goes on: the first checkpoint would stand still for it. Collective, after the first step."""
        settings = self.run.checkpoint
        if (settings.every_steps or settings.every_minutes) and self._may_copy():
            lengths = [len(KINDS) * count for count in self.engine.owned_elements()]
            self._reserving = Behind(lambda: self._snapshot.reserve(lengths))

    def close(self) -> None:
        """Leave no thread at work on memory for copies."""
        self._snapshot.give_up()
        if self._reserving is not None:
            self._reserving.result()

    def is_due(self) -> bool:
        """Whether the time since the last checkpoint asks for one; rank 0's clock decides for all."""
        minutes = self.run.checkpoint.every_minutes
        return minutes is not None and self.world.is_main and time.monotonic() - self.saved_at >= 60 * minutes

    def no_time(self, left_s: float) -> str:
        """Why another save would not be over in time, judged by the last one; empty when it would. Collective.

        Args:
            left_s: seconds that this rank has left.
        """
        answers = distributed.gather_objects((left_s, self._last_cost_s))
        left_s, cost_s = min(left for left, _ in answers), MARGIN * max(cost for _, cost in answers)
        if cost_s <= left_s:
            return ""
        stands = f"that of step {self.stands} stands" if self.stands else "there is none"
        return f"without a new checkpoint, which may take {cost_s:.1f} s where {max(0.0, left_s):.1f} s are left; {stands}"

    def save(self, progress: Progress, metrics: dict[str, float], *, last: bool) -> None:
        """Begin a checkpoint of `progress.step`. Collective, with no reduction of a step under way.

        Args:
            progress: where the run stands.
            metrics: of the evaluation of this step; empty when there was none.
            last: no training follows: it is written at once, and to fail ends the run.

        Raises:
            Failure: on all ranks, when the last one could not be saved.
        """
        self.finish()
        started = time.perf_counter()
        self.saved_at = time.monotonic()
        with distributed.together("save"):
            if self._cleaning is not None:
                self._cleaning.result()
        waits = last or not self._may_copy()
        flight = Flight(self._fields(progress, metrics, probe=waits or bool(metrics)), progress.best_step, self.engine.buffers())
        try:
            commit.check_room(self.run.run_path, flight.fields, self.disks)
        except Failure as error:
            self._give_up(flight, error, last=last)
            return
        self._flight = flight
        if waits:
            with distributed.together("save"):
                flight.answer = self._write(flight, _marked(self.engine.named_slices()))
            flight.stall_s = time.perf_counter() - started
            self.finish(last=last)
        else:
            self._write_behind(flight)
            flight.stall_s = time.perf_counter() - started

    def finish(self, *, last: bool = False) -> None:
        """Commit what is on its way, waiting for those who still write. Collective.

        Raises:
            Failure: on all ranks, when it could not be saved and is the `last`.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return
        started = time.perf_counter()
        mark("save")
        with distributed.together("save"):
            if flight.behind is not None:
                flight.answer = flight.behind.result()
                flight.beside_s = max(0.0, flight.behind.seconds - (time.perf_counter() - started))
        try:
            folder = commit.conclude(
                flight.answer, run_dir=self.run.run_path, fields=flight.fields, attempt=self.attempt, world=self.world, disks=self.disks
            )
        except Failure as error:
            self._give_up(flight, error, last=last)
            return
        self.stands = flight.step
        with distributed.together("save"):
            self._retain(flight.best_step, wait=last)
        self._record(flight, folder, stall_s=flight.stall_s + time.perf_counter() - started)

    def _write(self, flight: Flight, groups: Iterable[SliceGroup]) -> commit.Answer:
        return commit.write(groups, flight.buffers, run_dir=self.run.run_path, step=flight.step, attempt=self.attempt, rank=self.world.rank)

    def _write_behind(self, flight: Flight) -> None:
        """Copy, and let a thread write the copy; a rank that cannot copy tells the others at the end."""
        if self._reserving is not None:
            self._reserving.result()
        try:
            copies = self._snapshot.take(_marked(self.engine.named_slices(to_host=False)))
        except Exception as error:
            flight.answer = (None, f"{type(error).__name__}: {error}")
            return
        flight.behind = Behind(lambda: self._write(flight, copies))

    def _may_copy(self) -> bool:
        """Whether the host memory of all hosts takes the copies; looked at once, when everything else has its memory. Collective."""
        if not self.run.checkpoint.asynchronous:
            return False
        if self._fits is None:
            needs: dict[str, list[tuple[int, float]]] = {}
            own = sum(self.engine.owned_elements()) * commit.BYTES_PER_PARAMETER
            for host, needed, free in distributed.gather_objects((self.world.host, own, memory.available_bytes())):
                needs.setdefault(host, []).append((needed, math.inf if free is None else free))
            lacking = [text for host, ranks in needs.items() if (text := _lacking(host, ranks))]
            self._fits = not lacking
            if lacking:
                say("Checkpoints are written while training stands still: " + "; ".join(lacking))
        return self._fits

    def _give_up(self, flight: Flight, error: Failure, *, last: bool) -> None:
        """A full disk or a broken one ends no run that could go on; only the last checkpoint must be there."""
        if self.world.is_main:
            ledger.append(self.run.run_path, "unsaved", step=flight.step, reason=str(error))
        if last:
            raise error
        say(f"{error}\n  Training goes on; the next checkpoint is tried when it is due.")

    def _retain(self, best_step: int, *, wait: bool) -> None:
        """Delete in a thread what need not be kept: large files take long to go."""
        if not self.disks.is_leader:
            return
        settings = self.run.checkpoint
        kept = {"keep_last": settings.keep_last, "best_step": best_step if settings.keep_best else None, "keep_every_steps": settings.keep_every_steps}
        self._cleaning = Behind(lambda: _clean(self.run.run_path, kept))
        if wait:
            self._cleaning.result()

    def _record(self, flight: Flight, folder: Path, *, stall_s: float) -> None:
        seconds = stall_s + flight.beside_s
        self._last_cost_s = seconds
        if self.world.is_main:
            size = commit.size_bytes(flight.fields["parameters"])
            say(f"step {flight.step}: checkpoint saved in {format_seconds(seconds)} ({format_bytes(size)})")
            ledger.append(
                self.run.run_path, "save", step=flight.step, checkpoint=folder.name, seconds=round(seconds, 3), stall_seconds=round(stall_s, 3), bytes=size,
            )
        self.recorder.extra(flight.step, {"checkpoint/stall_seconds": stall_s, "checkpoint/save_seconds": seconds})

    def _fields(self, progress: Progress, metrics: dict[str, float], *, probe: bool) -> dict[str, Any]:
        """What the manifest says; the probe is left out where training would wait for it more than for all the rest. Collective."""
        return {
            "step": progress.step,
            "rows_consumed": progress.rows,
            "data_fingerprint": self.witness.data.train.fingerprint,
            "run_file": self.run.model_dump(mode="json"),
            "engine": self.engine.name,
            "pipeline_stages": self.run.engine.pipeline_stages,
            "zero_stage": self.engine.stage,
            "offload": {what: offload_device(self.ds_config, what) for what in ("optimizer", "param")},
            "parameters": self.engine.parameters(),
            "tied": self.engine.tied(),
            "groups": [{k: v for k, v in g.items() if k != "params" and isinstance(v, int | float | bool | list | tuple)} for g in self.engine.param_groups],
            "loss_scale": self.engine.loss_scale(),
            "metrics": metrics,
            "state": progress.state(),
            "certificate": self.witness.facts(progress, probe=probe),
        }


def _marked(groups: Iterable[SliceGroup]) -> Iterator[SliceGroup]:
    """The same, with a sign of life before each: a large checkpoint takes longer than a rank may be silent."""
    for group in groups:
        mark("save")
        yield group


def _lacking(host: str, ranks: list[tuple[int, float]]) -> str:
    """Why the copies of a host's ranks do not fit; empty when they do."""
    needed, free = sum(need for need, _ in ranks), min(free for _, free in ranks)
    if needed <= FREE_SHARE * free:
        return ""
    return f"a copy of the state would take {format_bytes(needed)} on {host}, where {format_bytes(int(free))} are free"


def _clean(run_dir: Path, kept: dict[str, Any]) -> None:
    try:
        shelf.retain(run_dir, **kept)
    except (OSError, Failure) as error:
        say(f"Old checkpoints cannot be deleted: {error}")
