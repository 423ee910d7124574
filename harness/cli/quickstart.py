"""The quickstart: from Python's own documentation to a fine-tuned GPT-2 that answers, in one command."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.config.load import Loaded, load
from harness.errors import Failure, HarnessError, Refused
from harness.launch import local, operators
from harness.launch.run import run
from harness.units import format_seconds

RUNS = Path(__file__).resolve().parents[2] / "launch" / "runs"


@dataclass(frozen=True)
class Engine:
    """How the fine-tuning is done.

    Attributes:
        label: in words.
        suffix: of the folders that it makes.
        overrides: of the run file.
    """

    label: str
    suffix: str
    overrides: tuple[str, ...] = ()


ENGINES = {
    "zero": Engine("ZeRO-3, CPU offload", ""),
    "pipeline": Engine("2 pipeline stages, CPU offload", "-pipeline", ("engine.pipeline_stages=2", "engine.deepspeed=zero1_offload_cpu", "train.micro_batch=2")),
}


@dataclass
class Clock:
    """Seconds by phase, in the order in which they passed."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce a phase and add up its time."""
        self.console.rule(f"[bold]{len(self.seconds) + 1}. {name}", align="left")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def main(argv: list[str] | None = None) -> int:
    """Run all phases; what an earlier run has finished is reused."""
    parser = argparse.ArgumentParser(prog="launch/quickstart.sh", description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs/quickstart"), help="folder for everything that is made")
    parser.add_argument("--engine", choices=ENGINES, default="zero", help="what fine-tunes: ZeRO-3, or a pipeline of two stages")
    arguments = parser.parse_args(argv)
    console = Console()
    try:
        return _quickstart(arguments.dir, ENGINES[arguments.engine], console)
    except HarnessError as error:
        console.print(Text.assemble(("quickstart:", "red"), f" {error}"))
        return error.exit_code


def _quickstart(folder: Path, engine: Engine, console: Console) -> int:
    os.environ.update(operators.environment())
    gpus = local.num_gpus()
    clock = Clock(console)
    if gpus == 1 and engine is ENGINES["pipeline"]:
        raise Refused("Two pipeline stages need two GPUs, and this machine has one.", where="--engine", remedy="Leave --engine out, or hide the GPU (CUDA_VISIBLE_DEVICES=) to use the CPU.")
    pretrain, finetune = (Job.of(stem, folder, gpus, engine) for stem in ("pretrain", "finetune"))
    exported = folder / f"finetuned{engine.suffix}"
    with clock.phase("operators of DeepSpeed"):
        operators.build(operators.needed(optimizer_offload="cpu", nvme=False, gpu=gpus > 0), speak=True)
    with clock.phase("prepare: prose, tokenizer"):
        _prepare(pretrain.loaded, console)
    with clock.phase("pre-train a small GPT-2 from scratch"):
        _train(pretrain)
        _export(pretrain.loaded, folder / "pretrained")
    with clock.phase("prepare: questions and answers"):
        _prepare(finetune.loaded, console)
    with clock.phase(f"fine-tune it: {engine.label}"):
        _train(finetune)
    with clock.phase("export"):
        _export(finetune.loaded, exported)
    with clock.phase("answer held-out questions"):
        _answer(finetune.loaded, exported, console)
    _table(console, clock, pretrain.loaded, finetune.loaded, exported)
    return 0


@dataclass(frozen=True)
class Job:
    """A shipped run file, what differs from it here, and both together."""

    run_file: Path
    overrides: list[str]
    loaded: Loaded

    @classmethod
    def of(cls, stem: str, folder: Path, gpus: int, engine: Engine) -> Job:
        """`pretrain` or `finetune` in `folder`; on GPUs their number and type differ too."""
        if stem == "pretrain":
            words = [f"run_dir={folder / stem}", f"data.dir={folder / 'data' / 'prose'}"]
        else:
            words = [f"run_dir={folder / (stem + engine.suffix)}", f"data.dir={folder / 'data' / 'questions'}",
                     f"model.path={folder / 'pretrained'}", f"data.tokenizer={folder / 'pretrained'}", *engine.overrides]
        if gpus:
            words += [f"launch.ranks={1 if gpus == 1 else 2}", "train.precision=bf16"]
        run_file = RUNS / f"quickstart_{stem}.yaml"
        return cls(run_file, words, load(run_file, words))


def _prepare(loaded: Loaded, console: Console) -> None:
    from harness.data.prepare import prepare

    console.print(prepare(loaded.run).render(console))


def _train(job: Job) -> None:
    from harness.formats.outcome import read_outcome

    loaded = job.loaded
    before = read_outcome(loaded.run.run_path)
    if before is not None and before.state == "done":
        print(f"already done: {loaded.run.run_dir} (remove the folder to train again)")
        return
    plan = local.plan(loaded, run_file=str(job.run_file), overrides=job.overrides)
    ended = run(plan)
    if ended.code:
        raise Failure(f"Training in {loaded.run.run_dir} ended with code {ended.code}; its logs are in {loaded.run.run_dir}/attempts/.")


def _export(loaded: Loaded, to: Path) -> None:
    from harness.checkpoint.export import export

    if (to / "config.json").is_file():
        print(f"already exported: {to}")
        return
    print(f"exported to {export(loaded.run.run_path, to)}")


def _answer(loaded: Loaded, exported: Path, console: Console) -> None:
    from harness.data.prepare import held_out_questions
    from harness.generation import Generator

    generator = Generator.load(exported)
    for question in held_out_questions(loaded.run, count=3):
        console.print(Text.assemble((question, "bold"), f"\n  {generator.answer(question, max_new_tokens=40)}"))


def _evaluations(loaded: Loaded) -> list[dict[str, Any]]:
    from harness.telemetry.read import read_metrics

    return [line for line in read_metrics(loaded.run.run_path) if "eval/loss" in line]


def _speed(loaded: Loaded) -> float:
    from harness.telemetry.read import read_metrics

    speeds = sorted(line["speed/tokens_per_second"] for line in read_metrics(loaded.run.run_path) if "speed/tokens_per_second" in line)
    return speeds[len(speeds) // 2] if speeds else math.nan


def _table(console: Console, clock: Clock, pretrain: Loaded, finetune: Loaded, exported: Path) -> None:
    """Evaluation loss and perplexity before and after, speed, and time by phase."""
    results = Table("training", "evaluation loss", "perplexity", "tokens/s", title="What was learned", title_justify="left")
    for name, loaded in (("from scratch on prose", pretrain), ("fine-tuned on questions", finetune)):
        first, *_, last = _evaluations(loaded)
        results.add_row(
            name, f"{first['eval/loss']:.3f} -> {last['eval/loss']:.3f}", f"{first['eval/perplexity']:,.1f} -> {last['eval/perplexity']:,.1f}",
            f"{_speed(loaded):,.0f}",
        )
    times = Table("phase", "time", title="Time by phase", title_justify="left")
    for name, seconds in clock.seconds.items():
        times.add_row(name, format_seconds(seconds))
    times.add_row("all", format_seconds(sum(clock.seconds.values())))
    console.print(results)
    console.print(times)
    console.print(f"TensorBoard:  tensorboard --logdir {exported.parent}", highlight=False, markup=False)
    activate = Path(sys.prefix) / "bin" / "activate"
    if activate.is_file():
        console.print(f"Try it:       source {os.path.relpath(activate)}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{'' if activate.is_file() else 'Try it:':14}harness generate {exported} --prompt 'What does `shutil.copytree` do?'", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
