"""Checkpoints that are written while training goes on: their bytes, their failures, and the end of a run. Two ranks, the real loop."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from harness.checkpoint import commit, shelf
from harness.checkpoint.disks import Disks
from harness.checkpoint.read import SliceReader
from harness.config.schema import RunFile
from harness.errors import Failure, StopRequested
from harness.files import digest_file
from harness.formats import ledger
from harness.formats.manifest import read_manifest
from harness.telemetry.recorder import Silence
from harness.testing.models import VOCABULARY, tiny_config
from harness.testing.rows import cut, random_rows
from harness.train.certify import Witness
from harness.train.evaluate import Evaluation
from harness.train.course import Course
from harness.train.loop import Trainer
from harness.train.opened import Work
from harness.train.progress import Progress
from harness.train.saving import Saver
from harness.train.schedule import Schedule
from harness.train.trace import Tracer
from tests.data.conftest import make_run, write_pairs
from tests.engine import work

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with prepared data."""
    from harness.data.prepare import prepare

    folder = tmp_path_factory.mktemp("saving")
    pairs = write_pairs(folder / "pairs.jsonl", 40)
    prepare(make_run(folder, train={"path": str(pairs)}, shape="prompt_completion", num_processes=1), progress=False)
    return folder


class Rows:
    """Stands where the loader stands; `before` is called with the number of the step that a batch is for.

    Args:
        witness: knows this rank's place.
        before: what happens before a step.
    """

    error, wait_seconds, global_rows = None, 0.0, work.ROWS

    def __init__(self, witness: Witness, before: Callable[[int], None]):
        self.witness, self.before, self.table = witness, before, witness.data.train

    def __iter__(self) -> Iterator[Any]:
        for step in range(1, 100):
            self.before(step)
            rows = random_rows(step, rows=work.ROWS, length=work.LENGTH, vocabulary=VOCABULARY)
            batch = cut(rows, micro_batch=2, rank=self.witness.grid.dp_rank, ranks=self.witness.grid.dp_size)
            yield replace(batch, first_position=(step - 1) * work.ROWS, end=step * work.ROWS)


def train(
    base: str, run_dir: str, steps: int, before: Callable[[int], None] = lambda step: None, stop: Any = None, *, name: str = "zero1",
    **settings: Any,
) -> Trainer:
    """Train with the real loop and saver on this rank; the trainer is given back with its engine open, and `failure` of a run that failed."""
    from harness import distributed
    from harness.data.sets import open_data
    from harness.engine.open import open_engine
    from harness.resilience.agreement import Agreement
    from harness.resilience.hearing import Hearing
    from harness.resilience.signals import StopFlag
    from harness.world import Grid, World

    data = make_run(Path(base), train={"path": str(Path(base) / "pairs.jsonl")}, shape="prompt_completion").data
    run = RunFile.model_validate(work.run_file(micro_batch=2).model_dump() | {"data": data.model_dump(), "run_dir": run_dir, "checkpoint": settings})
    grid = Grid(1, distributed.size(), distributed.rank())
    merged = work.ds_config(name, run, ranks=grid.dp_size, nvme=f"{run_dir}-nvme")
    engine = open_engine(run, tiny_config("gpt2"), copy.deepcopy(merged), device=torch.device("cpu"), weights=None)
    witness = Witness(run, engine, open_data(run), grid, work.ROWS)
    run.run_path.mkdir(exist_ok=True)
    distributed.barrier()
    world = World(rank=grid.rank, size=grid.ranks)
    saver = Saver(run, engine, witness, world, Disks.shared(world), Silence(), merged, attempt=1, stands=0)
    course = Course(steps, Schedule("constant", work.LR, work.STEPS), Rows(witness, before))
    stop = StopFlag() if stop is None else stop

    def never(*_: Any) -> Any:
        raise AssertionError("nothing is taken back here")

    return Trainer(
        run=run, engine=engine, course=course, rows_per_epoch=lambda: None, work=Work(1.0, 1, None), agreement=Agreement(engine.device), recorder=Silence(),
        hearing=Hearing(lambda: bool(stop), engine.device), stop=stop, evaluate=lambda: Evaluation(1.0, 0.5, 1), answer=list, saver=saver,
        save_requested=lambda: False, trace_requested=lambda: False,
        tracer=Tracer(run.run_path, rank=grid.rank, takes_part=False, note=never), go_back=never, quarantine=lambda progress, step, first, last: "", note=lambda kind, **facts: None,
        progress=Progress(), is_evaluated=True,
    )


def close(trainer: Trainer) -> None:
    from harness import distributed

    trainer.saver.close()
    trainer.saver.witness.data.close()
    trainer.engine.close()
    distributed.barrier()


class Patched:
    """`write_tensors` of this rank replaced for as long as the context is open."""

    def __init__(self, instead: Callable[..., Any]):
        self.instead, self.original = instead, commit.write_tensors

    def __enter__(self) -> None:
        commit.write_tensors = lambda *args: self.instead(self.original, *args)

    def __exit__(self, *_: Any) -> None:
        commit.write_tensors = self.original


def events(run_dir: str | Path, *kinds: str) -> list[tuple[str, int]]:
    return [(event["kind"], event["step"]) for event in ledger.read(Path(run_dir)) if event["kind"] in kinds]


def content(folder: Path) -> dict[str, str]:
    return {path.name: digest_file(path) for path in folder.glob("*.safetensors")}


def held_back(base: str, run_dir: str, name: str, asynchronous: bool) -> tuple[bool, bool]:
    """Nine steps with a checkpoint of the fifth, whose writer waits until the eighth begins. Returns whether it did, and whether weights changed meanwhile."""
    gate, waited, seen = threading.Event(), [], {}

    def wait(original: Any, path: Path, *rest: Any) -> Any:
        if "step-000005" in str(path) and asynchronous:
            waited.append(gate.wait(60))
        return original(path, *rest)

    def before(step: int) -> None:
        if step in (6, 8):
            seen[step] = work.masters(trainer.engine)
        if step == 8:
            assert asynchronous != bool(shelf.committed(Path(run_dir)))
            gate.set()

    trainer = train(base, run_dir, 9, before, name=name, every_steps=5, asynchronous=asynchronous)
    with Patched(wait):
        trainer.fit()
    close(trainer)
    changed = any((seen[8][key] != seen[6][key]).any() for key in seen[8])
    return all(waited) and bool(waited), changed


@pytest.mark.parametrize("name", ["zero1", "zero3_offload_cpu", pytest.param("zero3_offload_nvme", marks=SLOW), pytest.param("zero2", marks=SLOW)])
def test_the_bytes_are_those_of_the_step_though_training_went_on(base, ranks2, tmp_path, name):
    """Against a synchronous save of the same step; the thread begins to write only when two more steps were trained."""
    assert ranks2.run(held_back, str(base), str(tmp_path / "plain"), name, False) == [(False, True)] * 2
    assert ranks2.run(held_back, str(base), str(tmp_path / "behind"), name, True) == [(True, True)] * 2
    for step in ("step-000005", "step-000009"):
        plain, behind = (tmp_path / kind / "checkpoints" / step for kind in ("plain", "behind"))
        assert content(plain) == content(behind) and len(content(plain)) >= 2
        first, second = read_manifest(plain).certificate, read_manifest(behind).certificate
        assert first.probe and second.model_copy(update={"probe": first.probe}) == first
        assert second.probe == (first.probe if step == "step-000009" else None), "training does not wait for a probe alone"
        assert shelf.inspect(behind)[1] == []
    saves = [event for event in ledger.read(tmp_path / "behind") if event["kind"] == "save"]
    assert [event["step"] for event in saves] == [5, 9] and saves[0]["seconds"] > saves[0]["stall_seconds"] > 0
    assert saves[1]["seconds"] == saves[1]["stall_seconds"] and saves[0]["bytes"] > 0


def fails_on_rank_1(base: str, run_dir: str) -> int:
    from harness import distributed

    def fail(original: Any, path: Path, *rest: Any) -> Any:
        if "step-000004" in str(path) and distributed.rank() == 1:
            raise OSError(5, "Input/output error")
        return original(path, *rest)

    trainer = train(base, run_dir, 6, every_steps=2, keep_last=1, keep_best=False)
    with Patched(fail):
        trainer.fit()
    close(trainer)
    return trainer.saver.stands


def test_a_write_that_fails_on_one_rank_is_learned_by_all_and_training_goes_on(base, ranks2, tmp_path):
    run_dir = tmp_path / "run"
    assert ranks2.run(fails_on_rank_1, str(base), str(run_dir)) == [6, 6]
    assert events(run_dir, "save", "unsaved") == [("save", 2), ("unsaved", 4), ("save", 6)]
    failed = next(event for event in ledger.read(run_dir) if event["kind"] == "unsaved")
    assert "rank 1: OSError: [Errno 5] Input/output error" in failed["reason"] and "the one before it stands" in failed["reason"]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["latest", "step-000006"]


def fails_at_the_end(base: str, run_dir: str) -> str:
    def fail(original: Any, path: Path, *rest: Any) -> Any:
        if "step-000003" in str(path):
            raise OSError(5, "Input/output error")
        return original(path, *rest)

    trainer = train(base, run_dir, 3, every_steps=2)
    try:
        with Patched(fail):
            trainer.fit()
    except Failure as error:
        close(trainer)
        return str(error)
    return ""


def test_a_last_checkpoint_that_cannot_be_written_fails_the_run(base, ranks2, tmp_path):
    first, second = ranks2.run(fails_at_the_end, str(base), str(tmp_path / "run"))
    assert first == second and "The checkpoint of step 3 was not saved; the one before it stands." in first and "rank 1: OSError" in first
    assert events(tmp_path / "run", "save", "unsaved") == [("save", 2), ("unsaved", 3)]


def fills_the_disk(base: str, run_dir: str) -> int:
    """The disk is full while the checkpoint of step 4 is written, and empty again before step 6 is."""
    from harness import distributed

    ballast = Path(run_dir) / "checkpoints" / "ballast"

    def fill(original: Any, path: Path, *rest: Any) -> Any:
        if "step-000004" in str(path):
            with open(ballast, "ab") as stream:
                try:
                    while True:
                        os.write(stream.fileno(), bytes(4096))
                except OSError:
                    pass
        return original(path, *rest)

    def before(step: int) -> None:
        if step == 6:
            while trainer.saver.writing:
                time.sleep(0.01)
            distributed.barrier()
            ballast.unlink(missing_ok=True)

    trainer = train(base, run_dir, 6, before, every_steps=2, keep_last=1)
    with Patched(fill):
        trainer.fit()
    close(trainer)
    return trainer.saver.stands


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_ends_no_run(base, ranks2, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        assert ranks2.run(fills_the_disk, str(base), str(tmp_path / "run")) == [6, 6]
        assert events(tmp_path / "run", "save", "unsaved") == [("save", 2), ("unsaved", 4), ("save", 6)]
        assert any("No space left on device" in event.get("reason", "") for event in ledger.read(tmp_path / "run"))
        assert shelf.inspect(folder / "step-000006")[1] == []
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def every_step(base: str, run_dir: str) -> list[int]:
    """A checkpoint at every step, each written more slowly than a step takes."""
    from harness import distributed

    def slowly(original: Any, *args: Any) -> Any:
        time.sleep(0.3 * distributed.rank())
        return original(*args)

    trainer = train(base, run_dir, 4, every_steps=1, keep_last=9)
    with Patched(slowly):
        trainer.fit()
    there = [step for step, _ in shelf.committed(Path(run_dir))]
    close(trainer)
    return there


def test_a_save_that_comes_due_waits_for_the_one_before(base, ranks2, tmp_path):
    """And all are committed when the loop is over."""
    run_dir = tmp_path / "run"
    assert ranks2.run(every_step, str(base), str(run_dir)) == [[4, 3, 2, 1]] * 2
    assert events(run_dir, "save", "unsaved") == [("save", step) for step in (1, 2, 3, 4)]
    assert all(shelf.inspect(folder)[1] == [] for _, folder in shelf.committed(run_dir))


def stopped(base: str, run_dir: str, grace_s: float | None) -> str:
    """The second rank gets a signal at step 4; a checkpoint takes half a second."""
    from harness import distributed
    from harness.resilience.signals import StopFlag

    stop = StopFlag()

    def before(step: int) -> None:
        if step == 4 and distributed.rank() == 1:
            stop._set(signal.SIGTERM, None)

    def slowly(original: Any, *args: Any) -> Any:
        time.sleep(0.5)
        return original(*args)

    trainer = train(base, run_dir, 9, before, stop, every_steps=2, grace_seconds=grace_s)
    with Patched(slowly):
        try:
            trainer.fit()
        except StopRequested as request:
            close(trainer)
            return str(request)
    return ""


@pytest.mark.parametrize("grace_s, saved", [(None, True), (60.0, True), (0.7, False)])
def test_a_stop_that_leaves_no_time_saves_nothing_and_says_what_stands(base, ranks2, tmp_path, grace_s, saved):
    first, second = ranks2.run(stopped, str(base), str(tmp_path / "run"), grace_s)
    steps = [step for _, step in events(tmp_path / "run", "save")]
    assert first == second and first.endswith("start the same command again to go on.")
    if saved:
        assert first.startswith(f"Stopped on request after step {steps[-1]};") and steps[-1] >= 4
    else:
        assert "without a new checkpoint, which may take " in first and f"that of step {steps[-1]} stands" in first
    assert shelf.committed(tmp_path / "run")[0][0] == steps[-1]


def cost(base: str, run_dir: str) -> tuple[float, float]:
    """A checkpoint that is waited for as soon as it has begun: the seconds that it took, and what the saver makes of them."""
    def slowly(original: Any, *args: Any) -> Any:
        time.sleep(0.5)
        return original(*args)

    trainer = train(base, run_dir, 1, every_steps=1)
    trainer.progress.step = 1
    started = time.perf_counter()
    with Patched(slowly):
        trainer.saver.save(trainer.progress, {}, last=False)
        trainer.saver.finish()
    seconds = time.perf_counter() - started
    close(trainer)
    return seconds, trainer.saver._last_cost_s


def test_what_is_waited_for_counts_once(base, ranks1, tmp_path):
    """In the time that a checkpoint is said to take, by which the last one before an end is left out."""
    ((seconds, counted),) = ranks1.run(cost, str(base), str(tmp_path / "run"))
    assert seconds >= 0.5 and counted == pytest.approx(seconds, abs=0.2)
    (event,) = [event for event in ledger.read(tmp_path / "run") if event["kind"] == "save"]
    assert event["seconds"] == pytest.approx(counted, abs=1e-3) and event["stall_seconds"] <= event["seconds"]


def short_of_memory(base: str, run_dir: str) -> bool:
    from harness import memory

    with mock.patch.object(memory, "available_bytes", lambda: 100_000):
        trainer = train(base, run_dir, 4, every_steps=2)
        trainer.fit()
    close(trainer)
    return bool(trainer.saver._snapshot._buffers)


def who_makes_memory(base: str, run_dir: str) -> set[str]:
    from harness.checkpoint import background

    makers, original = [], background._host_memory

    def host_memory(length: int) -> Any:
        makers.append(threading.current_thread().name)
        return original(length)

    with mock.patch.object(background, "_host_memory", host_memory):
        trainer = train(base, run_dir, 4, every_steps=2)
        trainer.fit()
    close(trainer)
    return set(makers)


def test_training_does_not_wait_for_the_memory_of_the_first_copy(base, ranks2, tmp_path):
    assert ranks2.run(who_makes_memory, str(base), str(tmp_path / "run")) == [{"checkpoint"}, {"checkpoint"}]


def test_where_the_copy_does_not_fit_training_waits(base, ranks2, tmp_path):
    assert ranks2.run(short_of_memory, str(base), str(tmp_path / "run")) == [False, False]
    saves = [event for event in ledger.read(tmp_path / "run") if event["kind"] == "save"]
    assert [event["step"] for event in saves] == [2, 4] and all(event["seconds"] == event["stall_seconds"] for event in saves)


def outlasts(base: str, run_dir: str, seconds: float) -> int:
    """What one rank alone reads and writes takes longer than the ranks wait for each other in a collective."""
    from datetime import timedelta

    from torch.distributed.distributed_c10d import _set_pg_timeout

    from harness import distributed
    from harness.checkpoint import resume
    from harness.checkpoint.disks import Disks
    from harness.world import World

    def slowly(original: Any, *args: Any, **options: Any) -> Any:
        if distributed.rank() == 1 or args[0].name.startswith("rank-00001"):
            time.sleep(seconds)
        return original(*args, **options)

    trainer = train(base, run_dir, 2, keep_best=False)
    _set_pg_timeout(timedelta(seconds=0.6 * seconds))
    with Patched(slowly):
        trainer.fit()
    close(trainer)
    with mock.patch.object(shelf, "digest_file", partial(slowly, shelf.digest_file)):
        found = resume.newest(Path(run_dir), Disks.shared(World(rank=distributed.rank(), size=2)), tell=print)
    _set_pg_timeout(timedelta(minutes=3))
    assert found is not None
    return found[1].step


@SLOW
def test_no_wait_in_a_collective_bounds_what_one_rank_reads_or_writes(base, ranks2, tmp_path):
    assert ranks2.run(outlasts, str(base), str(tmp_path / "run"), 5.0) == [2, 2]


def counts_steps(base: str, run_dir: str) -> None:
    """The model keeps the number of the step that it is in, as models keep running means."""

    def before(step: int) -> None:
        trainer.engine.model.get_buffer("seen").fill_(step)

    trainer = train(base, run_dir, 4, before, every_steps=2)
    trainer.engine.model.register_buffer("seen", torch.zeros((), dtype=torch.int64))
    trainer.fit()
    close(trainer)


def test_a_checkpoint_has_the_buffers_of_its_step(base, ranks2, tmp_path):
    ranks2.run(counts_steps, str(base), str(tmp_path / "run"))
    found = {step: SliceReader(folder, read_manifest(folder)).buffers() for step, folder in shelf.committed(tmp_path / "run")}
    assert found == {4: {"seen": 4}, 2: {"seen": 2}}
