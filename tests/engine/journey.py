"""A run in legs, each with its own ranks, engine and disks, through the commits, the choice of a checkpoint and the certificate of `train`."""

from __future__ import annotations

import copy
import itertools
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.config.schema import RunFile
from harness.testing.models import tiny_config
from harness.train.schedule import Schedule
from tests.checkpoint.fabricate import commit_groups
from tests.data.conftest import make_run, write_pairs
from tests.engine import work

LAYERS, STEPS = 4, 4
SCHEDULE = Schedule("cosine", work.LR, total_steps=30, warmup_steps=2)


@dataclass(frozen=True)
class Leg:
    """`STEPS` steps.

    Attributes:
        ranks: how many.
        name: of the DeepSpeed configuration.
        stages: of the pipeline.
        places: the run's folder of each rank, in turn; the folder's name is that of its host.
    """

    ranks: int
    name: str
    stages: int = 1
    places: tuple[str, ...] = ()


@dataclass
class Travelled:
    """What a leg gives: losses and learning rates of its steps, what all ranks said, and where it began."""

    first: int
    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


def prepare_data(folder: Path) -> None:
    """What all legs train on."""
    from harness.data.prepare import prepare

    pairs = write_pairs(folder / "pairs.jsonl", 120)
    prepare(make_run(folder, train={"path": str(pairs)}, shape="prompt_completion", num_processes=1), progress=False)


def travel(folder: str, run_dir: str, leg: Leg, last: int, dropout: float) -> Travelled:
    """On one rank: go on from the newest checkpoint, if there is one, to step `last`, and save."""
    from harness import distributed
    from harness.checkpoint import resume
    from harness.checkpoint.disks import find
    from harness.data.loader import TrainLoader
    from harness.data.sets import open_data
    from harness.engine.open import open_engine
    from harness.train.certify import Witness
    from harness.train.progress import Progress
    from harness.train.rollback import load
    from harness.world import Grid, World

    said = _Said()
    rank, grid = distributed.rank(), Grid(leg.stages, distributed.size(), distributed.rank())
    place = Path(leg.places[rank % len(leg.places)] if leg.places else run_dir)
    place.mkdir(parents=True, exist_ok=True)
    run = _run_file(folder, place, leg)
    world = World(rank=rank, size=distributed.size(), host=place.name)
    disks = find(place, world)
    found = resume.newest(place, disks, tell=logging.getLogger("harness").info)
    merged = work.ds_config(leg.name, run, ranks=grid.dp_size, nvme=f"{folder}/nvme")
    engine = open_engine(run, tiny_config("gpt2", layers=LAYERS, dropout=dropout), copy.deepcopy(merged), device=torch.device("cpu"), weights=None)
    data = open_data(run)
    witness, progress = Witness(run, engine, data, grid, work.ROWS), Progress()
    order = data.train.order(seed=run.train.seed, window_shards=run.data.window_shards)
    if found:
        progress = load(engine, found, disks)
        witness.check(found, progress, order=order, schedule=SCHEDULE)
    travelled = Travelled(first=progress.step + 1)
    loader = TrainLoader(data.train, order, dp_rank=grid.dp_rank, dp_size=grid.dp_size, micro_batch=2, global_rows=work.ROWS, start=progress.rows)
    for batch in itertools.islice(loader, last - progress.step):
        progress.step, progress.rows = progress.step + 1, progress.rows + batch.rows
        travelled.lrs.append(SCHEDULE.lr(progress.step))
        total = engine.train_step(batch, step=progress.step, lr=travelled.lrs[-1]).loss_sum.clone()
        distributed.all_reduce_sum(total)
        travelled.losses.append(total.item() / batch.trained_tokens)
    loader.close()
    fields = {
        "step": last, "rows_consumed": progress.rows, "data_fingerprint": data.train.fingerprint, "run_file": run.model_dump(mode="json"),
        "engine": engine.name, "parameters": engine.parameters(), "tied": engine.tied(), "state": progress.state(), "certificate": witness.facts(progress),
    }
    commit_groups(engine.named_slices(), run_dir=place, fields=fields, attempt=1, world=world, disks=disks)
    engine.close()
    data.close()
    distributed.barrier()
    travelled.said = [text for texts in distributed.gather_objects(said.end()) for text in texts]
    return travelled


def _run_file(folder: str, place: Path, leg: Leg) -> RunFile:
    told = work.run_file(micro_batch=2, stages=leg.stages).model_dump()
    data = make_run(Path(folder), train={"path": f"{folder}/pairs.jsonl"}, shape="prompt_completion").data.model_dump()
    return RunFile.model_validate(told | {"data": data, "run_dir": str(place)})


class _Said(logging.Handler):
    """Keeps what is said through the harness's logger."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.logger = logging.getLogger("harness")
        self.before = self.logger.level
        self.logger.addHandler(self)
        self.logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def end(self) -> list[str]:
        self.logger.removeHandler(self)
        self.logger.setLevel(self.before)
        return self.texts


def journey(pools: dict[int, Any], folder: Path, run_dir: Path, legs: list[Leg], *, dropout: float = 0.0) -> list[Travelled]:
    """Legs one after another in `run_dir`, or where each leg's ranks have it."""
    return [
        pools[leg.ranks].run(travel, str(folder), str(run_dir), leg, number * STEPS, dropout)[0] for number, leg in enumerate(legs, 1)
    ]


def tensors(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """kind -> parameter -> the whole of it, from a checkpoint."""
    from harness.checkpoint.read import SliceReader
    from harness.formats.manifest import KINDS, read_manifest

    reader = SliceReader(folder, read_manifest(folder))
    return {kind: {name: reader.read(kind, name, 0, entry.numel).numpy() for name, entry in reader.manifest.parameters.items()} for kind in KINDS}
