"""Named slices of a pipeline: an exact resume, and any number of stages or the ZeRO engine after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import work
from tests.engine.test_pipeline import LAYERS, opened

SLOW = pytest.mark.slow


def leg(run_dir: str, name: str, stages: int, first: int, last: int, dropout: float) -> list[float]:
    """Open an engine, go on from the checkpoint in `run_dir` when there is one, train steps `first` to `last`, save; the losses."""
    from harness import distributed
    from harness.checkpoint import commit, read
    from harness.testing.models import VOCABULARY
    from harness.testing.rows import cut, random_rows
    from harness.world import Grid, World

    grid = Grid(stages, distributed.size(), distributed.rank())
    engine = opened(name, "gpt2", stages=stages, dropout=dropout)
    found, _ = commit.newest_good(Path(run_dir))
    if found:
        engine.load_slices(read.SliceReader(*found).read, step=found[1].adam_step)
    losses = []
    for step in range(first, last + 1):
        rows = random_rows(step, rows=work.ROWS, length=work.LENGTH, vocabulary=VOCABULARY)
        batch = cut(rows, micro_batch=2, rank=grid.dp_rank, ranks=grid.dp_size)
        total = engine.train_step(batch, step=step, lr=work.LR).loss_sum.clone()
        distributed.all_reduce_sum(total)
        losses.append(total.item() / batch.trained_tokens)
    fields = {"step": last, "rows_consumed": last * work.ROWS, "data_fingerprint": "x", "engine": engine.name, "parameters": engine.parameters(), "tied": engine.tied()}
    commit.save(engine.named_slices(), run_dir=Path(run_dir), fields=fields, attempt=1, world=World(rank=distributed.rank(), size=distributed.size()))
    engine.close()
    distributed.barrier()
    return losses


def journey(pools: dict, run_dir: Path, legs: list[tuple[int, str, int]], *, dropout: float = 0.0, steps: int = 5) -> list[float]:
    """Losses of consecutive legs of (ranks, DeepSpeed configuration, stages)."""
    losses = []
    for number, (ranks, name, stages) in enumerate(legs):
        losses += pools[ranks].run(leg, str(run_dir), name, stages, number * steps + 1, (number + 1) * steps, dropout)[0]
    return losses


@pytest.fixture
def pools(ranks1, ranks2, ranks4):
    return {1: ranks1, 2: ranks2, 4: ranks4}


@pytest.mark.parametrize("name", ["zero1", pytest.param("zero1_offload_cpu", marks=SLOW)])
def test_a_resumed_pipeline_is_the_undisturbed_one(pools, tmp_path, name):
    whole = pools[2].run(leg, str(tmp_path / "whole"), name, 2, 1, 10, 0.1)[0]
    assert journey(pools, tmp_path / "cut", [(2, name, 2), (2, name, 2)], dropout=0.1) == whole


@pytest.mark.parametrize("legs", [
    [(4, "zero1", 4), (2, "zero1_offload_cpu", 2), (1, "zero1", 1), (2, "zero3", 1)],
    pytest.param([(2, "zero3", 1), (4, "zero1", 2), (4, "zero3_offload_cpu", 1), (4, "zero1", 4)], marks=SLOW),
    pytest.param([(2, "zero1", 2), (2, "zero1", 1), (4, "zero1_offload_cpu", 2), (2, "zero2", 1)], marks=SLOW),
])
def test_another_number_of_stages_or_engine_goes_on(pools, tmp_path, legs):
    expected = work.plain("gpt2", layers=LAYERS)["losses"]
    assert journey(pools, tmp_path, legs) == pytest.approx(expected[: 5 * len(legs)], rel=1e-5)
