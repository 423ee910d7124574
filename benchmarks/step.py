"""What one optimizer step costs on the host: Python calls and collectives, exactly, for the harness, a bare DeepSpeed loop and Trainer.

Counts are the same on every run; seconds are shown as ratios of loops that ran side by side and mean little on a busy machine.

With `--stages N` it measures instead how long the stages of a pipeline wait for each other, beside what the schedule says.

usage: python benchmarks/step.py [--deepspeed NAME] [--layers N] [--rounds N] [--stages N]
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MICRO, ACCUMULATION, LENGTH, VOCABULARY, WIDTH = 2, 2, 64, 512, 64
WARM_UP, COUNTED, TIMED = 3, 2, 10
PIPELINE_LENGTH, PIPELINE_WIDTH = 256, 256
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "_all_gather_base", "all_gather_single", "reduce_scatter", "reduce_scatter_tensor",
               "reduce_scatter_single", "_reduce_scatter_base", "broadcast", "reduce", "all_to_all_single", "barrier", "all_gather_object", "broadcast_object_list")


class Meter:
    """Counts Python calls and collectives of the steps between `start` and `stop`."""

    def __init__(self) -> None:
        self.calls, self.collectives = 0, Counter()
        self._originals: dict[str, Any] = {}

    def start(self) -> None:
        import torch.distributed as dist

        for name in COLLECTIVES:
            if hasattr(dist, name):
                self._originals[name] = getattr(dist, name)
                setattr(dist, name, self._counted(name, getattr(dist, name)))
        sys.setprofile(self._count)

    def stop(self) -> None:
        import torch.distributed as dist

        sys.setprofile(None)
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _count(self, frame: Any, event: str, argument: Any) -> None:
        self.calls += event == "call"

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.collectives[name] += 1
            return original(*args, **kwargs)

        return counted


def measure(step: Callable[[int], None]) -> dict[str, Any]:
    """Calls and collectives of one step, and seconds of each timed one."""
    number = 0

    def go() -> None:
        nonlocal number
        number += 1
        step(number)

    for _ in range(WARM_UP):
        go()
    meter = Meter()
    meter.start()
    for _ in range(COUNTED):
        go()
    meter.stop()
    seconds = []
    for _ in range(TIMED):
        started = time.perf_counter()
        go()
        seconds.append(time.perf_counter() - started)
    return {"calls": meter.calls / COUNTED, "collectives": {k: v / COUNTED for k, v in sorted(meter.collectives.items())}, "seconds": seconds}


def _run(name: str, layers: int) -> tuple[Any, Any, dict[str, Any]]:
    from harness import distributed
    from harness.config.batch import BatchEquation
    from harness.config.deepspeed import merge
    from harness.config.load import Loaded
    from harness.config.schema import RunFile
    from harness.testing.models import tiny_config

    rows = MICRO * ACCUMULATION * distributed.size()
    run = RunFile.model_validate({
        "run_dir": "unused", "data": {"dir": "unused", "train": {"path": "unused"}, "sequence_length": LENGTH}, "model": {"architecture": {"model_type": "gpt2"}},
        "train": {"steps": 1, "global_batch_rows": rows, "micro_batch": MICRO, "precision": "fp32"}, "engine": {"deepspeed": name, "nvme_dir": tempfile.gettempdir()},
    })
    batch = BatchEquation(rows, MICRO, ACCUMULATION, distributed.size(), LENGTH)
    return run, tiny_config("gpt2", layers=layers, width=WIDTH, vocabulary=VOCABULARY), merge(Loaded(run, {}), batch, nvme_path=tempfile.mkdtemp())


def harness_loop(name: str, layers: int) -> dict[str, Any]:
    """This harness's engine with its agreement a step."""
    import torch

    from harness import distributed
    from harness.engine.zero import ZeroEngine
    from harness.resilience.agreement import Agreement
    from harness.testing.rows import cut, random_rows

    run, config, ds_config = _run(name, layers)
    engine = ZeroEngine(run, config, ds_config, device=torch.device("cpu"), weights=None)
    agreement = Agreement(engine.device)
    rows = random_rows(1, rows=run.train.global_batch_rows, length=LENGTH, vocabulary=VOCABULARY)
    batch = cut(rows, micro_batch=MICRO, rank=distributed.rank(), ranks=distributed.size())

    def step(number: int) -> None:
        result = engine.train_step(batch, step=number, lr=1e-4)
        agreement.collect()
        agreement.offer(result.loss_sum, result.aux_loss_sum, stop=False, save=False)

    answer = measure(step)
    agreement.collect()
    engine.close()
    distributed.barrier()
    return answer


def bare_loop(name: str, layers: int) -> dict[str, Any]:
    """The shortest DeepSpeed loop: backward, step, and the loss summed over the ranks once a step."""
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from harness import distributed
    from harness.config.deepspeed import offload_device
    from harness.engine.optimizer import build_optimizer
    from harness.model.build import decay_groups
    from harness.testing.rows import cut, random_rows

    run, config, ds_config = _run(name, layers)
    alive = HfDeepSpeedConfig(ds_config) if "zero3" in name else None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = build_optimizer(decay_groups(model, 0.01), run.optimizer, offloaded=offload_device(ds_config, "optimizer") != "none", use_gpu=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    engine.train()
    rows = random_rows(1, rows=run.train.global_batch_rows, length=LENGTH, vocabulary=VOCABULARY)
    micro = cut(rows, micro_batch=MICRO, rank=distributed.rank(), ranks=distributed.size()).micro_batches

    def step(number: int) -> None:
        total = torch.zeros(())
        for batch in micro:
            output = engine(input_ids=torch.as_tensor(batch.input_ids), position_ids=torch.as_tensor(batch.position_ids),
                            labels=torch.as_tensor(batch.labels), use_cache=False)
            engine.backward(output.loss)
            engine.step()
            total += output.loss.detach()
        distributed.all_reduce_sum(total)

    answer = measure(step)
    engine.destroy()
    del alive
    distributed.barrier()
    return answer


def trainer_loop(name: str, layers: int) -> dict[str, Any]:
    """Hugging Face Trainer with the same JSON, its logging and saving off."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from harness import distributed
    from harness.testing.rows import random_rows

    run, config, ds_config = _run(name, layers)
    ds_config = {key: value for key, value in copy.deepcopy(ds_config).items() if key != "zero_allow_untested_optimizer"}
    steps = WARM_UP + COUNTED + TIMED
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=MICRO, gradient_accumulation_steps=ACCUMULATION, max_steps=steps, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, deepspeed=ds_config | {"zero_allow_untested_optimizer": True},
        max_grad_norm=run.train.clip, optim="adamw_torch",
    )
    ids, _, labels = random_rows(1, rows=run.train.global_batch_rows * steps, length=LENGTH, vocabulary=VOCABULARY)
    data = [{"input_ids": torch.as_tensor(a), "labels": torch.as_tensor(b)} for a, b in zip(ids, labels, strict=True)]
    meter, marks = Meter(), []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            marks.append(time.perf_counter())
            if state.global_step == WARM_UP:
                meter.start()
            if state.global_step == WARM_UP + COUNTED:
                meter.stop()

    model = AutoModelForCausalLM.from_config(config)
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Watch()]).train()
    marks.append(time.perf_counter())
    distributed.barrier()
    seconds = [b - a for a, b in zip(marks, marks[1:], strict=False)][WARM_UP + COUNTED :]
    return {"calls": meter.calls / COUNTED, "collectives": {k: v / COUNTED for k, v in sorted(meter.collectives.items())}, "seconds": seconds}


def idle_shares(stages: int, layers: int, micro_batches: int) -> float:
    """The median idle share of a pipeline of equal stages, as `speed/pipeline_idle_share` has it."""
    import torch

    from harness import distributed
    from harness.config.batch import BatchEquation
    from harness.config.deepspeed import merge
    from harness.config.load import Loaded
    from harness.config.schema import RunFile
    from harness.engine.pipeline import PipelineEngine
    from harness.resilience.agreement import Agreement
    from harness.testing.models import tiny_config
    from harness.testing.rows import cut, random_rows

    rows = MICRO * micro_batches
    run = RunFile.model_validate({
        "run_dir": "unused", "data": {"dir": "unused", "train": {"path": "unused"}, "sequence_length": PIPELINE_LENGTH},
        "model": {"architecture": {"model_type": "llama"}}, "train": {"steps": 1, "global_batch_rows": rows, "micro_batch": MICRO, "precision": "fp32"},
        "engine": {"deepspeed": "zero1", "pipeline_stages": stages},
    })
    ds_config = merge(Loaded(run, {}), BatchEquation(rows, MICRO, micro_batches, 1, PIPELINE_LENGTH, stages))
    config = tiny_config("llama", layers=layers, width=PIPELINE_WIDTH, vocabulary=64)
    engine = PipelineEngine(run, config, ds_config, device=torch.device("cpu"), weights=None)
    agreement, shares = Agreement(engine.device), []
    batch = cut(random_rows(1, rows=rows, length=PIPELINE_LENGTH, vocabulary=64), micro_batch=MICRO, rank=0, ranks=1)
    for step in range(WARM_UP + TIMED):
        result = engine.train_step(batch, step=step + 1, lr=1e-4)
        agreement.offer(result.loss_sum, result.aux_loss_sum, stop=False, save=False, busy_s=result.busy_s, window_s=result.window_s)
        shares.append(agreement.collect().idle_share)
    engine.close()
    distributed.barrier()
    return statistics.median(shares[WARM_UP:])


def show_idle_shares(stages: int, layers: int) -> None:
    """Print measured and scheduled idle shares for growing numbers of micro-batches."""
    from rich.console import Console
    from rich.table import Table

    from harness.preflight.stages import bubble
    from harness.testing.pool import RankPool

    pool = RankPool(stages)
    table = Table("micro-batches", "(p - 1) / (m + p - 1)", "measured", title=f"idle share, {stages} stages of {layers // stages} equal blocks", title_justify="left")
    for micro_batches in (1, 2, 4, 8, 16):
        measured = pool.run(idle_shares, stages, layers, micro_batches)[0]
        table.add_row(str(micro_batches), f"{bubble(stages, micro_batches):.1%}", f"{measured:.1%}")
    pool.close()
    Console(width=150).print(table)


LOOPS = {"harness": harness_loop, "bare DeepSpeed": bare_loop, "Trainer": trainer_loop}


def compare(name: str, layers: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Every loop on two fresh ranks, side by side, `rounds` times; counts of the first round, seconds of all."""
    from harness.testing.pool import RankPool

    results: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for label, loop in LOOPS.items():
            pool = RankPool(2)
            answer = pool.run(loop, name, layers)[0]
            pool.close()
            kept = results.setdefault(label, answer | {"seconds": []})
            kept["seconds"] += answer["seconds"]
    return results


def main() -> int:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    from harness.launch import operators

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed", default="zero3")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--stages", type=int, default=1)
    arguments = parser.parse_args()
    os.environ.update(operators.environment())
    os.environ["PYTHONPATH"] = f"{Path(__file__).resolve().parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    if arguments.stages > 1:
        show_idle_shares(arguments.stages, arguments.layers)
        return 0
    results = compare(arguments.deepspeed, arguments.layers, arguments.rounds)
    base = results["bare DeepSpeed"]
    table = Table("loop", "Python calls a step", "to bare", "collectives a step", "median step to bare",
                  title=f"{arguments.deepspeed}, {arguments.layers} layers, accumulation {ACCUMULATION}, 2 ranks", title_justify="left")
    for label, result in results.items():
        ratio = statistics.median(result["seconds"]) / statistics.median(base["seconds"])
        names = ", ".join(f"{count:g} {name}" for name, count in result["collectives"].items())
        table.add_row(label, f"{result['calls']:,.0f}", f"{result['calls'] - base['calls']:+,.0f}", f"{sum(result['collectives'].values()):g} ({names})", f"{ratio:.2f}")
    Console(width=150).print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
