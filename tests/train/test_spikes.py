"""What stands out of the recent losses, and what does not."""

from __future__ import annotations

import math
import random

import pytest

from harness.resilience.spikes import LEAST, SpikeWatch


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
