"""The composition root of `train`: objects are built in the order things happen, and handed on by name."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness import collector, distributed, log
from harness.checkpoint import commit, resume, shelf
from harness.checkpoint.disks import Disks, find
from harness.config.batch import BatchEquation, batch_equation
from harness.config.deepspeed import merge
from harness.config.load import Loaded
from harness.config.schema import RunFile
from harness.data import in_use
from harness.data.loader import eval_batches
from harness.data.mixture import MixedTable
from harness.data.rows import RowTable
from harness.data.sets import RunData, open_data
from harness.errors import HarnessError, Refused, first_line
from harness.formats import ledger
from harness.generation import answer_prompts, write_description
from harness.heartbeat import began, mark, spent
from harness.log import say
from harness.model.configure import load_config, load_tokenizer
from harness.model.flops import flops_per_token, peak_flops
from harness.resilience.agreement import Agreement
from harness.resilience.guard import Guard, show_stacks_on_request
from harness.resilience.hearing import Hearing
from harness.resilience.signals import Requests, StopFlag
from harness.telemetry.recorder import Recorder
from harness.train.attempt import Attempt
from harness.train.certify import Witness
from harness.train.changes import Changes
from harness.train.course import Course
from harness.train.evaluate import Evaluation, evaluate
from harness.train.loop import Trainer
from harness.train.opened import Work
from harness.train.progress import Progress
from harness.train.quarantine import Quarantine
from harness.train.rollback import WayBack, load
from harness.train.saving import Saver
from harness.train.trace import Tracer
from harness.world import Grid, World

if TYPE_CHECKING:
    from harness.engine.common import CommonEngine
    from harness.formats.manifest import Manifest


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
    device, attempt, stop = _meet(loaded, world, use_gpu=use_gpu, attempt=attempt)
    mark("build")
    config = load_config(loaded)
    held, data = in_use.hold(run.data), open_data(run)
    table, template = data.train, data.template
    tokenizer = load_tokenizer(str(data.tokenizer), where="data", trust_code=run.model.trust_code)
    if world.is_main:
        write_description(run.run_path / "model", config, tokenizer, template, base=run.model.path)
    grid = Grid(run.engine.pipeline_stages, world.size, world.rank)
    batch = batch_equation(loaded, grid.dp_size)
    ds_config = merge(loaded, batch, nvme_path=_nvme_path(run, world))
    if world.is_main:
        attempt.write_deepspeed(ds_config)
    disks = _find_disks(run, world)
    found = _newest_checkpoint(run.run_path, disks)
    changes = Changes.since(run, data, found)
    _note(run.run_path, "start", attempt=attempt.number, began=began(), phases=spent(), ranks=world.size, host=world.host, rows=table.fingerprint,
          first_row=changes.first_row(found), passed=changes.passed(found))
    engine = _build_engine(run, config, ds_config, device=device, found=found)
    _check_room(run, engine, disks)
    mark("load")
    progress = _resume(engine, found, run, disks)
    changes.accept(progress)
    requests = Requests(run.run_path, stop)
    hearing = Hearing(requests.asked, device, requests.asked_of_all)
    for rows in data.validation.values():
        rows.heed(hearing.gives_up)

    def ahead(progress: Progress) -> Course:
        return Course.ahead(run, table, grid, batch, progress, pinned=use_gpu)

    course = ahead(progress)
    recorder = Recorder.open(run.run_path, attempt=attempt.number, main=world.is_main, resumed_step=progress.step, total_steps=course.total_steps)
    recorder.hyper_parameters(attempt.hyper_parameters())

    def note(kind: str, **facts: Any) -> None:
        _note(run.run_path, kind, **facts)

    witness = Witness(run, engine, data, grid, batch.rows)
    saver = Saver(run, engine, witness, world, disks, recorder, ds_config, attempt=attempt.number, stands=progress.step)
    quarantine = Quarantine(run)
    tracer = Tracer(attempt.folder / "traces", rank=world.rank, takes_part=grid.dp_rank == 0, note=note)
    trainer = Trainer(
        run=run, engine=engine, course=course, rows_per_epoch=lambda: table.num_rows if table.is_whole else None, work=_work(run, engine),
        agreement=Agreement(device), hearing=hearing, recorder=recorder,
        evaluate=lambda: _evaluate(engine, data, grid, run.evaluation.micro_batch or run.train.micro_batch, hearing),
        answer=lambda: answer_prompts(engine, tokenizer, template, run.evaluation.prompts, max_new_tokens=run.evaluation.max_new_tokens, hearing=hearing),
        stop=stop, saver=saver, save_requested=lambda: requests.taken("save") or saver.is_due(), trace_requested=lambda: requests.taken("trace"),
        tracer=tracer,
        go_back=WayBack(engine, disks, lambda: _newest_checkpoint(run.run_path, disks), ahead, witness, recorder, note),
        quarantine=quarantine, note=note,
        progress=progress, is_evaluated=_is_evaluated(run, found, course),
    )
    _announce(run, engine, batch, table, course, progress)
    try:
        if found:
            witness.check(found, progress, order=course.loader.order, schedule=course.schedule)
        return _go(trainer, found, is_whole=distributed.broadcast_object(data.is_whole))
    finally:
        tracer.close()
        saver.close()
        quarantine.close()
        trainer.course.loader.close()
        data.close()
        held.close()
        recorder.close()


def _meet(loaded: Loaded, world: World, *, use_gpu: bool, attempt: Attempt | None) -> tuple[torch.device, Attempt, StopFlag]:
    """Meet the other ranks; from then on there are logs and stacks, requests are flags, and all libraries are loaded."""
    mark("meet")
    device = distributed.init(world, use_gpu=use_gpu, timeout_minutes=loaded.run.engine.timeout_minutes)
    number = distributed.broadcast_object(attempt.number if attempt else 0)
    attempt = attempt or Attempt.at(number, loaded)
    log.setup(world, attempt.logs)
    show_stacks_on_request(attempt.logs / f"stacks-{world.rank:05d}.txt")
    stop = StopFlag()
    stop.install()
    Guard(stop).start()
    collector.as_usual()
    return device, attempt, stop


def _go(trainer: Trainer, found: tuple[Path, Manifest] | None, *, is_whole: bool) -> Evaluation:
    """From where the run stands to its last evaluation; before its first step it has a look, where all is prepared."""
    step = trainer.progress.step
    if step == 0 and trainer.run.evaluation.at_start and not is_whole:
        say("The evaluation before the first step is left out: the validation set is still being prepared.")
    elif step == 0 and trainer.run.evaluation.at_start:
        trainer.first_look()
    elif over := _why_over(trainer, found):
        say(f"{over}; evaluating its newest checkpoint.")
        return trainer.last_look()
    return trainer.fit()


def _why_over(trainer: Trainer, found: tuple[Path, Manifest] | None) -> str:
    """Why there is nothing left to train, by an evaluation that a checkpoint has; empty where there is."""
    progress, total, patience = trainer.progress, trainer.course.total_steps, trainer.run.evaluation.patience
    if progress.step >= total and trainer.is_evaluated:
        return f"The run already has its {total} steps"
    if found and patience is not None and "eval/loss" in found[1].metrics and progress.bad_evaluations >= patience:
        return f"The run ended at step {progress.step} by evaluation.patience: the best loss is that of step {progress.best_step}"
    return ""


def _is_evaluated(run: RunFile, found: tuple[Path, Manifest] | None, course: Course) -> bool:
    """Whether a checkpoint has the evaluation that was due at its step; a request to stop may have come before."""
    if found is None:
        return True
    step, every = found[1].step, run.evaluation.every_steps
    return "eval/loss" in found[1].metrics or not (step >= course.total_steps or (every is not None and step % every == 0))


def _evaluate(engine: CommonEngine, data: RunData, grid: Grid, micro_batch: int, hearing: Hearing) -> Evaluation:
    errors: list[HarnessError] = []
    batches = {
        name: eval_batches(rows, dp_rank=grid.dp_rank, dp_size=grid.dp_size, micro_batch=micro_batch, errors=errors)
        for name, rows in data.validation.items()
    }
    return evaluate(engine, batches, errors, hearing=hearing)


def _nvme_path(run: RunFile, world: World) -> str | None:
    """A folder of this run and host: DeepSpeed clears what it is given, so two runs must never share one."""
    if run.engine.nvme_dir is None:
        return None
    return str(Path(run.engine.nvme_dir) / f"{run.run_path.absolute().name}-{_folder_key(run)}" / world.host)


def _folder_key(run: RunFile) -> str:
    """A short name for the run's own folder, so that equal names in different places do not meet."""
    from harness.files import digest_text

    return digest_text(str(run.run_path.absolute()))[:8]


def _find_disks(run: RunFile, world: World) -> Disks:
    disks = find(run.run_path, world)
    if not disks.is_one:
        say(f"{run.run_dir} is on {len(disks.order)} disks: {'; '.join(disks.names)}. Each keeps the checkpoint files of its own ranks.")
    return disks


def _newest_checkpoint(run_dir: Path, disks: Disks) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that holds, the same on every rank."""

    def tell(reason: str) -> None:
        say(f"Checkpoint passed over: {reason}")
        _note(run_dir, "skip", reason=reason)

    return resume.newest(run_dir, disks, tell=tell)


def _build_engine(run: RunFile, config: Any, ds_config: dict[str, Any], *, device: torch.device, found: Any) -> Any:
    from harness.engine.open import open_engine

    started = time.perf_counter()
    engine = open_engine(run, config, ds_config, device=device, weights=None if found else run.model.path, fresh=found is None)
    say(f"Model and optimizer built in {time.perf_counter() - started:.1f} s.")
    return engine


def _check_room(run: RunFile, engine: CommonEngine, disks: Disks) -> None:
    """Refuse before the first step what could not be saved later: what is kept, and one more while it is written; leftovers go first."""
    if disks.is_leader:
        shelf.sweep(run.run_path)
    checkpoints = run.checkpoint.keep_last + run.checkpoint.keep_best + 1
    lacking = commit.room_problems(run.run_path, engine.parameters(), checkpoints=checkpoints, disks=disks)
    if lacking:
        raise Refused(lacking, where="run_dir, checkpoint.keep_last", remedy="Make room there, set `run_dir` to another disk, or keep fewer checkpoints.")


def _resume(engine: Any, found: tuple[Path, Manifest] | None, run: RunFile, disks: Disks) -> Progress:
    if found is None:
        return Progress()
    folder, progress = found[0], load(engine, found, disks)
    engine.try_model()
    say(f"Resuming from {folder.name}: step {progress.step}, {progress.rows:,} rows consumed.")
    if distributed.rank() == 0:
        ledger.append(run.run_path, "resume", step=progress.step, checkpoint=folder.name)
    return progress


def _note(run_dir: Path, kind: str, **facts: Any) -> None:
    if distributed.rank() == 0:
        ledger.append(run_dir, kind, **facts)


def _work(run: RunFile, engine: CommonEngine) -> Work:
    """What a token costs, and what the GPU of a rank can do."""
    gpu = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else ""
    try:
        flops = flops_per_token(engine.whole_model(), run.data.sequence_length)
    except Exception as error:  # a configuration like no other is no reason not to train
        say(f"What a token costs this model is not known, so that no FLOP/s are told: {first_line(error)}")
        flops = None
    return Work(flops, distributed.size(), peak_flops(gpu, run.train.precision))


def _announce(run: RunFile, engine: Any, batch: BatchEquation, table: RowTable | MixedTable, course: Course, progress: Progress) -> None:
    from harness.model.build import num_parameters

    stages = f" in {run.engine.pipeline_stages} pipeline stages" if run.engine.pipeline_stages > 1 else ""
    attention = engine.config._attn_implementation.removeprefix("harness_")
    say(f"{num_parameters(engine.whole_model()):,} parameters{stages}, {run.engine.deepspeed}, {run.train.precision}, {attention} attention; {batch.text()}")
    rows = f"{table.num_rows:,} rows an epoch, {table.filled_share:.1%} filled" if table.is_whole else "rows are still being made"
    say(f"{rows}; steps {progress.step} to {course.total_steps}")
