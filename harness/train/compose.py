"""The composition root of `train`: objects are built in the order things happen, and handed on by name."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import distributed, log
from harness.checkpoint import commit, read
from harness.config.batch import BatchEquation, batch_equation
from harness.config.deepspeed import merge
from harness.config.load import Loaded
from harness.config.schema import RunFile
from harness.data.loader import TrainLoader, eval_batches
from harness.data.mixture import MixedTable
from harness.data.rows import RowTable
from harness.data.provenance import origins
from harness.data.sets import RunData, open_data
from harness.errors import HarnessError, Refused
from harness.formats import ledger
from harness.generation import answer_prompts, write_description
from harness.heartbeat import began, mark
from harness.log import say
from harness.model.configure import load_config, load_tokenizer
from harness.resilience.agreement import Agreement
from harness.resilience.guard import Guard, show_stacks_on_request
from harness.resilience.signals import StopFlag
from harness.telemetry.recorder import Recorder
from harness.train.attempt import Attempt
from harness.train.certify import Witness
from harness.train.changes import Changes
from harness.train.evaluate import Evaluation, evaluate
from harness.train.loop import Progress, Trainer
from harness.train.saving import Saver
from harness.train.schedule import Schedule
from harness.world import Grid, World

if TYPE_CHECKING:
    import torch

    from harness.engine.common import CommonEngine
    from harness.formats.manifest import Manifest


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
    """The length of a run that may have been cut differently so far."""
    if run.train.steps is not None:
        return Length(run.train.steps, None)
    total_rows = math.ceil(run.train.epochs * rows_per_epoch)
    return Length(done.step + math.ceil(max(0, total_rows - done.rows) / batch_rows), total_rows)


def build_schedule(run: RunFile, *, steps: int, rows_per_epoch: int, batch_rows: int) -> Schedule:
    """The learning rate's course over `steps` optimizer steps."""
    settings = run.optimizer
    warmup = settings.warmup_steps or 0
    if settings.warmup_epochs is not None:
        warmup = math.ceil(settings.warmup_epochs * rows_per_epoch / batch_rows)
    decay = settings.decay_steps if settings.decay_steps is not None else max(1, steps // 10)
    return Schedule(settings.schedule, settings.lr, steps, warmup, decay, settings.min_lr_share)


def train(loaded: Loaded, world: World, *, use_gpu: bool, attempt: Attempt | None) -> Evaluation:
    """Run one attempt of training on this rank.

    Args:
        loaded: the run file, already checked.
        world: this rank's place.
        use_gpu: train on GPUs.
        attempt: the folder of this attempt; None on all ranks but the first.

    Returns:
        the last evaluation.
    """
    run = loaded.run
    mark("meet")
    device = distributed.init(world, use_gpu=use_gpu, timeout_minutes=run.engine.timeout_minutes)
    number = distributed.broadcast_object(attempt.number if attempt else 0)
    attempt = attempt or Attempt.at(number, loaded)
    log.setup(world, attempt.logs)
    show_stacks_on_request(attempt.logs / f"stacks-{world.rank:05d}.txt")
    stop = StopFlag()
    stop.install()
    Guard(stop).start()
    mark("build")
    config = load_config(loaded)
    data = open_data(run)
    table, template = data.train, data.template
    tokenizer = load_tokenizer(str(data.tokenizer), where="data", trust_code=run.model.trust_code)
    if world.is_main:
        write_description(run.run_path / "model", config, tokenizer, template)
    grid = Grid(run.engine.pipeline_stages, world.size, world.rank)
    batch = batch_equation(loaded, grid.dp_size)
    ds_config = merge(loaded, batch, nvme_path=_nvme_path(run, world))
    if world.is_main:
        attempt.write_deepspeed(ds_config)
    found = _newest_checkpoint(run.run_path)
    changes = Changes.since(run, data, found)
    _note(run.run_path, "start", attempt=number, began=began(), ranks=world.size, host=world.host, rows=table.fingerprint, first_row=changes.first_row(found))
    engine = _build_engine(run, config, ds_config, device=device, found=found)
    _check_room(run, engine)
    mark("load")
    progress = _resume(engine, found, run)
    changes.accept(progress)
    rows_per_epoch = table.num_rows if table.is_whole else 0
    length = run_length(run, rows_per_epoch=rows_per_epoch, batch_rows=batch.rows, done=progress)
    recorder = Recorder.open(run.run_path, attempt=attempt.number, main=world.is_main, resumed_step=progress.step, total_steps=length.steps)
    recorder.hyper_parameters(attempt.hyper_parameters())
    loader = TrainLoader(
        table, table.order(seed=run.train.seed, window_shards=run.data.window_shards), dp_rank=grid.dp_rank, dp_size=grid.dp_size,
        micro_batch=batch.micro_batch, global_rows=batch.rows, start=progress.rows, total_rows=length.total_rows, first_row=progress.first_row,
        pinned=use_gpu,
    )
    schedule = build_schedule(run, steps=length.steps, rows_per_epoch=rows_per_epoch, batch_rows=batch.rows)
    witness = Witness(run, engine, data, grid, batch.rows)
    saver = Saver(run, engine, witness, world, recorder, ds_config, attempt=number, stands=progress.step)
    trainer = Trainer(
        run=run, engine=engine, loader=loader, schedule=schedule,
        total_steps=length.steps, rows_per_epoch=lambda: table.num_rows if table.is_whole else None, agreement=Agreement(device), stop=stop, recorder=recorder,
        evaluate=lambda: _evaluate(engine, data, grid, run.evaluation.micro_batch or run.train.micro_batch),
        answer=lambda: answer_prompts(engine, tokenizer, template, run.evaluation.prompts, max_new_tokens=run.evaluation.max_new_tokens),
        saver=saver, save_requested=lambda: _asked(run.run_path, "save") or saver.is_due(),
        stop_requested=lambda: _asked(run.run_path, "stop"),
        quarantine=lambda step, first, last: _quarantine(run, step, first - progress.first_row, last - progress.first_row), note=lambda kind, **facts: _note(run.run_path, kind, **facts),
        progress=progress,
    )
    _announce(run, engine, batch, table, length, progress)
    try:
        if found:
            witness.check(found, progress, order=loader.order, schedule=schedule)
        whole = distributed.broadcast_object(data.is_whole)
        if progress.step == 0 and run.evaluation.at_start and not whole:
            say("The evaluation before the first step is left out: the validation set is still being prepared.")
        elif progress.step == 0 and run.evaluation.at_start:
            trainer.first_look()
        elif progress.step >= length.steps:
            say(f"The run already has its {length.steps} steps; evaluating its newest checkpoint.")
            return trainer.evaluate()
        return trainer.fit()
    finally:
        loader.close()
        data.close()
        recorder.close()


def _evaluate(engine: CommonEngine, data: RunData, grid: Grid, micro_batch: int) -> Evaluation:
    errors: list[HarnessError] = []
    batches = {
        name: eval_batches(rows, dp_rank=grid.dp_rank, dp_size=grid.dp_size, micro_batch=micro_batch, errors=errors)
        for name, rows in data.validation.items()
    }
    return evaluate(engine, batches, errors)


def _nvme_path(run: RunFile, world: World) -> str | None:
    """A folder of this run and host: DeepSpeed clears what it is given, so two runs must never share one."""
    if run.engine.nvme_dir is None:
        return None
    return str(Path(run.engine.nvme_dir) / f"{run.run_path.absolute().name}-{attempt_key(run)}" / world.host)


def attempt_key(run: RunFile) -> str:
    """A short name for the run's own folder, so that equal names in different places do not meet."""
    from harness.files import digest_text

    return digest_text(str(run.run_path.absolute()))[:8]


def _newest_checkpoint(run_dir: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that holds, as rank 0 sees it, on every rank."""
    found, skipped = None, []
    if distributed.rank() == 0:
        found, skipped = commit.newest_good(run_dir)
    found, skipped = distributed.broadcast_object((found, skipped))
    for reason in skipped:
        say(f"Checkpoint passed over: {reason}")
        if distributed.rank() == 0:
            ledger.append(run_dir, "skip", reason=reason)
    if found is None and commit.has_damaged(run_dir):
        raise Refused(
            "Every checkpoint of this run is damaged; training would begin anew.", where=str(run_dir / "checkpoints"),
            remedy="Mend one of them, or start a new run in another run_dir.",
        )
    return found


def _build_engine(run: RunFile, config: Any, ds_config: dict[str, Any], *, device: torch.device, found: Any) -> Any:
    from harness.engine.open import open_engine

    started = time.perf_counter()
    engine = open_engine(run, config, ds_config, device=device, weights=None if found else run.model.path)
    say(f"Model and optimizer built in {time.perf_counter() - started:.1f} s.")
    return engine


def _check_room(run: RunFile, engine: CommonEngine) -> None:
    """Refuse before the first step what could not be saved later: what is kept, and one more while it is written."""
    checkpoints = run.checkpoint.keep_last + run.checkpoint.keep_best + 1
    lacking = distributed.broadcast_object(commit.room_problem(run.run_path, engine.parameters(), checkpoints=checkpoints) if distributed.rank() == 0 else "")
    if lacking:
        raise Refused(lacking, where="run_dir, checkpoint.keep_last", remedy="Make room there, set `run_dir` to another disk, or keep fewer checkpoints.")


def _resume(engine: Any, found: tuple[Path, Manifest] | None, run: RunFile) -> Progress:
    if found is None:
        return Progress()
    folder, manifest = found
    reader = read.SliceReader(folder, manifest)
    engine.load_slices(reader.read, step=manifest.adam_step)
    engine.restore_loss_scale(manifest.loss_scale)
    progress = Progress.from_state(manifest.state)
    say(f"Resuming from {folder.name}: step {progress.step}, {progress.rows:,} rows consumed.")
    if distributed.rank() == 0:
        ledger.append(run.run_path, "resume", step=progress.step, checkpoint=folder.name)
    return progress


def _note(run_dir: Path, kind: str, **facts: Any) -> None:
    if distributed.rank() == 0:
        ledger.append(run_dir, kind, **facts)


def _quarantine(run: RunFile, step: int, first: int, last: int) -> str:
    """Write which documents a step was trained on; the tables of the loader's thread are left alone."""
    path = run.run_path / "quarantine.jsonl"
    if distributed.rank() == 0:
        data = open_data(run)
        ids = data.train.order(seed=run.train.seed, window_shards=run.data.window_shards).rows(first, last - first)
        with open(path, "a", encoding="utf-8") as lines:
            for place, row_id in enumerate(ids.tolist()):
                documents = [{"file": file, "row": row} for file, row in origins(data.train, row_id)]
                lines.write(json.dumps({"step": step, "position": first + place, "documents": documents}, ensure_ascii=False) + "\n")
        data.close()
    return str(path)


def _asked(run_dir: Path, what: str) -> bool:
    request = run_dir / "control" / what
    if distributed.rank() == 0 and request.exists():
        request.unlink(missing_ok=True)
        return True
    return False


def _announce(run: RunFile, engine: Any, batch: BatchEquation, table: RowTable | MixedTable, length: Length, progress: Progress) -> None:
    from harness.model.build import num_parameters

    stages = f" in {run.engine.pipeline_stages} pipeline stages" if run.engine.pipeline_stages > 1 else ""
    attention = engine.config._attn_implementation.removeprefix("harness_")
    say(f"{num_parameters(engine.whole_model()):,} parameters{stages}, {run.engine.deepspeed}, {run.train.precision}, {attention} attention; {batch.text()}")
    rows = f"{table.num_rows:,} rows an epoch, {table.filled_share:.1%} filled" if table.is_whole else "rows are still being made"
    say(f"{rows}; steps {progress.step} to {length.steps}")
