"""For how long a checkpoint stops training: the harness, which writes behind it, beside DeepSpeed's `save_checkpoint` of the same engine.

A GPT-2 of about 200 million parameters in fp32, two ranks on the CPU, ZeRO-3 with CPU offload, rows of 32 tokens; it takes about 18 GB of memory, and
`--layers 7 --width 768` (56 million) 6 GB. Every figure is of rank 0; the first checkpoint of each kind, which makes pages and files, is left out of the
medians.

usage: python benchmarks/checkpoint.py [--layers 15] [--width 1024] [--saves 4] [--steps 10] [--folder DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RANKS, ROWS, LENGTH, VOCABULARY, NAME = 2, 2, 32, 8192, "zero3_offload_cpu"
WARM_UP = 2


class Recorder:
    """Keeps what a saver records."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def extra(self, step: int, values: dict[str, float]) -> None:
        self.values.append(values)


class Clocked:
    """Something that is called, and the seconds that each call took."""

    def __init__(self, action: Callable[..., Any]):
        self.action, self.seconds = action, []

    def __call__(self, *args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = self.action(*args, **options)
        self.seconds.append(time.perf_counter() - started)
        return result


def _run(folder: Path) -> Any:
    """A run file with data of a few rows."""
    from harness.config.schema import RunFile

    return RunFile.model_validate({
        "run_dir": str(folder / "run"), "model": {"architecture": {"model_type": "gpt2"}},
        "data": {"dir": str(folder / "data"), "train": {"path": str(folder / "text.txt")}, "shape": "text", "validation_share": 0.2, "sequence_length": LENGTH,
                 "train_tokenizer": {"vocab_size": 320}, "num_processes": 1},
        "train": {"steps": 1, "global_batch_rows": ROWS, "micro_batch": 1, "precision": "fp32"}, "engine": {"deepspeed": NAME}, "checkpoint": {"every_steps": 1},
    })


def prepare(folder: Path) -> None:
    """Token shards for the probe of the certificate."""
    from harness.data.prepare import prepare as make

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=4)) for _ in range(50)]
    (folder / "text.txt").write_text("\n\n".join(" ".join(draw.choices(words, k=30)) for _ in range(200)))
    make(_run(folder), progress=False)


def peak_bytes(*, forget: bool) -> int:
    """Highest resident memory of all ranks together since it was last forgotten."""
    from harness import distributed

    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    return sum(distributed.gather_objects(peak))


class Bench:
    """An engine that trains, and the two ways to save it."""

    def __init__(self, folder: str, layers: int, width: int):
        import torch

        from harness import distributed
        from harness.checkpoint.disks import Disks
        from harness.config.batch import BatchEquation
        from harness.config.deepspeed import merge
        from harness.config.load import Loaded
        from harness.data.sets import open_data
        from harness.engine.zero import ZeroEngine
        from harness.resilience.agreement import Agreement
        from harness.testing.models import tiny_config
        from harness.train.certify import Witness
        from harness.train.loop import Progress
        from harness.train.saving import Saver
        from harness.world import Grid, World

        run, rank = _run(Path(folder)), distributed.rank()
        run.run_path.mkdir(exist_ok=True)
        merged = merge(Loaded(run, {}), BatchEquation(ROWS, 1, ROWS // RANKS, RANKS, LENGTH))
        config = tiny_config("gpt2", layers=layers, width=width, vocabulary=VOCABULARY)
        self.engine = ZeroEngine(run, config, merged, device=torch.device("cpu"), weights=None)
        self.witness, self.recorder = Witness(run, self.engine, open_data(run), Grid(1, RANKS, rank), ROWS), Recorder()
        world = World(rank=rank, size=RANKS)
        self.saver = Saver(run, self.engine, self.witness, world, Disks.shared(world), self.recorder, merged, attempt=1, stands=0)
        self.copy = Clocked(self.saver._snapshot.take)
        self.saver._snapshot.take = self.copy
        self.facts = Clocked(self.saver._fields)
        self.saver._fields = self.facts
        self.agreement, self.progress = Agreement(self.engine.device), Progress()
        self.parameters = sum(p.ds_numel for p in self.engine.model.parameters())

    def steps(self, count: int) -> list[float]:
        """Train; the seconds of each step, without the short end of a checkpoint."""
        from harness import distributed
        from harness.testing.rows import cut, random_rows

        seconds = []
        for _ in range(count):
            self.progress.step += 1
            batch = cut(random_rows(self.progress.step, rows=ROWS, length=LENGTH, vocabulary=VOCABULARY), micro_batch=1, rank=distributed.rank(), ranks=RANKS)
            started = time.perf_counter()
            result = self.engine.train_step(batch, step=self.progress.step, lr=1e-5)
            agreed = self.agreement.collect()
            seconds.append(time.perf_counter() - started)
            if agreed is not None and not agreed.writing:
                self.saver.finish()
            self.agreement.offer(result.loss_sum, result.aux_loss_sum, stop=False, save=False, writing=self.saver.writing)
        self.agreement.collect()
        return seconds

    def behind(self, steps: int) -> list[float]:
        """A checkpoint of the harness, written behind training; the seconds of the steps after it."""
        self.saver.save(self.progress, {}, last=False)
        after = self.steps(steps)
        self.saver.finish()
        return after

    def at_once(self) -> float:
        """Seconds of a checkpoint of the harness that training waits for."""
        save = Clocked(self.saver.save)
        save(self.progress, {}, last=True)
        return save.seconds[0]

    def deepspeed(self, folder: Path) -> float:
        """Seconds of DeepSpeed's own checkpoint."""
        from harness import distributed

        distributed.barrier()
        save = Clocked(self.engine.deepspeed.save_checkpoint)
        save(str(folder), tag="only")
        distributed.barrier()
        if distributed.rank() == 0:
            shutil.rmtree(folder / "only")
        distributed.barrier()
        return save.seconds[0]


def measure(folder: str, layers: int, width: int, saves: int, steps: int) -> dict[str, Any]:
    """Everything, on this rank: the kinds take turns, so that a machine's other work meets them alike."""
    bench = Bench(folder, layers, width)
    bench.steps(1)
    bench.saver.get_ready()
    bench.steps(WARM_UP)
    peak_bytes(forget=True)
    found: dict[str, list[Any]] = {"undisturbed": [], "deepspeed": [], "after": [], "at_once": []}
    peaks = dict.fromkeys(found, 0)

    def note(name: str, value: Any) -> None:
        found[name].append(value)
        peaks[name] = max(peaks[name], peak_bytes(forget=True))

    for _ in range(saves):
        note("undisturbed", bench.steps(steps // 2))
        note("deepspeed", bench.deepspeed(Path(folder) / "deepspeed"))
        bench.steps(1)
        note("after", bench.behind(steps))
    behind = list(bench.recorder.values)
    copies, facts = list(bench.copy.seconds), list(bench.facts.seconds)
    for _ in range(2):
        note("at_once", bench.at_once())
    bench.engine.close()
    stall = [values["checkpoint/stall_seconds"] for values in behind]
    written = [values["checkpoint/save_seconds"] - values["checkpoint/stall_seconds"] for values in behind]
    return found | {"parameters": bench.parameters, "stall": stall, "copy": copies, "facts": facts, "written": written, "peak_bytes": peaks}


def show(result: dict[str, Any]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    from harness.units import format_bytes

    def middle(name: str) -> str:
        return f"{statistics.median(result[name][1:]):.2f} s"

    undisturbed = statistics.median(statistics.mean(part) for part in result["undisturbed"][1:])
    after = statistics.median(statistics.mean(part) for part in result["after"][1:])
    peaks = result["peak_bytes"]
    table = Table("what", "median", title=f"{result['parameters'] / 1e6:.0f}M parameters, {NAME}, {RANKS} ranks, {os.cpu_count()} cores", title_justify="left")
    table.add_row("stall of DeepSpeed's save_checkpoint", middle("deepspeed"))
    table.add_row("stall of a checkpoint that training waits for", middle("at_once"))
    table.add_row("stall of a checkpoint behind it", middle("stall"))
    table.add_row("  the copy in it", middle("copy"))
    table.add_row("  manifest and probe in it", middle("facts"))
    table.add_row("writing in the background", middle("written"))
    table.add_row("a step, undisturbed", f"{undisturbed:.2f} s")
    table.add_row(f"a step, mean of {len(result['after'][0])} after a checkpoint", f"{after:.2f} s, {after / undisturbed:.2f} of undisturbed")
    for name, label in (("undisturbed", "training"), ("deepspeed", "save_checkpoint"), ("at_once", "waiting"), ("after", "behind")):
        table.add_row(f"peak memory of both ranks, {label}", format_bytes(peaks[name]))
    Console(width=150).print(table)


def main() -> int:
    """Measure on two fresh ranks and print a table."""
    from harness.launch import operators
    from harness.testing.pool import RankPool

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="where checkpoints go; a temporary folder otherwise")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.update(operators.environment())
    os.environ["PYTHONPATH"] = f"{Path(__file__).resolve().parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    work = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        prepare(work)
        pool = RankPool(RANKS)
        result = pool.run(measure, str(work), arguments.layers, arguments.width, arguments.saves, arguments.steps, timeout=3600)[0]
        pool.close()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
