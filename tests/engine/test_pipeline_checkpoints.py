"""Named slices of a pipeline: an exact resume. Another number of stages or the ZeRO engine after it: test_topology.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.fabricate import commit_groups
from tests.engine import work
from tests.engine.test_pipeline import opened

SLOW = pytest.mark.slow


def leg(run_dir: str, name: str, stages: int, first: int, last: int, dropout: float) -> list[float]:
    """Open an engine, go on from the checkpoint in `run_dir` when there is one, train steps `first` to `last`, save; the losses."""
    from harness import distributed
    from harness.checkpoint import read, shelf
    from harness.testing.models import VOCABULARY
    from harness.testing.rows import cut, random_rows
    from harness.world import Grid, World

    grid = Grid(stages, distributed.size(), distributed.rank())
    engine = opened(name, "gpt2", stages=stages, dropout=dropout)
    found, _ = shelf.newest_good(Path(run_dir))
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
    commit_groups(engine.named_slices(), run_dir=Path(run_dir), fields=fields, attempt=1, world=World(rank=distributed.rank(), size=distributed.size()))
    engine.close()
    distributed.barrier()
    return losses


@pytest.mark.parametrize("name", ["zero1", pytest.param("zero1_offload_cpu", marks=SLOW)])
def test_a_resumed_pipeline_is_the_undisturbed_one(ranks2, tmp_path, name):
    whole = ranks2.run(leg, str(tmp_path / "whole"), name, 2, 1, 10, 0.1)[0]
    cut = [ranks2.run(leg, str(tmp_path / "cut"), name, 2, first, first + 4, 0.1)[0] for first in (1, 6)]
    assert cut[0] + cut[1] == whole
