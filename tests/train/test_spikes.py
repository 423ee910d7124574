"""What stands out of the recent losses, and what does not."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from harness.resilience.spikes import LEAST, SpikeWatch
from tests.train import test_saving as real

base = real.base


def test_a_noisy_falling_loss_has_no_spike():
    draw, watch = random.Random(0), SpikeWatch(12.0)
    assert [watch.judge(10 * math.exp(-step / 300) + draw.gauss(0, 0.05)) for step in range(2000)] == [None] * 2000


@pytest.mark.parametrize("at", [LEAST, 50, 500])
def test_a_spike_is_seen_once_there_is_a_past(at):
    draw, watch = random.Random(1), SpikeWatch(12.0)
    scores = [watch.judge(3.0 + draw.gauss(0, 0.03) + (2.0 if step == at else 0.0)) for step in range(at + 20)]
    assert [step for step, score in enumerate(scores) if score] == [at] and scores[at] > 12


def test_the_first_losses_and_what_is_not_finite_are_not_judged():
    watch = SpikeWatch(2.0)
    assert [watch.judge(value) for value in [1.0, 100.0, 1.0, math.nan, math.inf]] == [None] * 5


def test_a_loss_that_hardly_moves_needs_more_than_rounding():
    watch = SpikeWatch(12.0)
    assert [watch.judge(2.0) for _ in range(60)] == [None] * 60
    assert watch.judge(2.001) is None and watch.judge(2.1) is not None


def test_a_level_that_stays_is_soon_no_spike():
    draw, watch = random.Random(2), SpikeWatch(12.0)
    scores = [watch.judge((2.0 if step < 200 else 4.0) + draw.gauss(0, 0.02)) for step in range(400)]
    assert scores[200] and not any(scores[330:])


class Few(real.Rows):
    """The rows of a run that ends, all but one of them empty."""

    def __iter__(self) -> Iterator[Any]:
        yield from (replace(batch, rows=1) for batch in super().__iter__())


def last_step(base: str, run_dir: str, rows: type[real.Rows]) -> list[str]:
    """What the real loop notes of a loss far above its past."""
    noted: list[str] = []
    trainer = real.train(base, run_dir, 1)
    trainer.note = lambda kind, **facts: noted.append(kind)
    trainer.course = replace(trainer.course, loader=rows(trainer.saver.witness, lambda step: None))
    trainer._watch = SpikeWatch(12.0, [0.5] * LEAST)
    trainer.fit()
    real.close(trainer)
    return noted


@pytest.mark.parametrize("rows, noted", [(real.Rows, ["running", "anomaly"]), (Few, ["running"])])
def test_a_batch_that_is_filled_up_is_not_judged(base, ranks1, tmp_path, rows, noted):
    """Its loss is that of the few rows that were left."""
    assert ranks1.run(last_step, str(base), str(tmp_path / "run"), rows) == [noted]
