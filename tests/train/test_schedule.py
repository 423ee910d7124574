"""The course of the learning rate against transformers' own schedules."""

from __future__ import annotations

import pytest

from harness.config.schema import Optimizer
from harness.train.course import build_schedule
from harness.train.schedule import Schedule
from tests.engine import work


def _reference(kind: str, total: int, warmup: int) -> list[float]:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    rates = []
    for _ in range(total + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_fall_equals_transformers(kind):
    total, warmup = 50, 7
    reference = _reference(kind, total, warmup)
    ours = Schedule(kind, 0.5, total, warmup)
    for step in range(1, total + 1):
        expected = reference[step] if step <= warmup else reference[step - 1]
        assert ours.lr(step) == pytest.approx(expected, abs=1e-12)


def test_warm_up_never_trains_with_zero():
    assert Schedule("constant", 0.5, 10, 5).lr(1) == pytest.approx(0.1)


def test_stable_then_decay():
    schedule = Schedule("warmup_stable_decay", 1.0, 100, 10, 20, 0.1)
    assert schedule.lr(10) == 1.0 and schedule.lr(80) == 1.0
    assert schedule.lr(81) == 1.0
    assert schedule.lr(91) == pytest.approx(0.1 + 0.9 * 0.5)
    assert all(schedule.lr(s) >= schedule.lr(s + 1) for s in range(80, 100))


def test_a_fall_begins_after_the_warm_up():
    """Whatever its default, where few steps are left; the rate never jumps."""
    run = work.run_file().model_copy(update={"optimizer": Optimizer(lr=1.0, schedule="warmup_stable_decay", warmup_steps=19)})
    schedule = build_schedule(run, steps=20, rows_per_epoch=0, batch_rows=1)
    assert schedule.lr(19) == schedule.lr(20) == 1.0
    run = run.model_copy(update={"optimizer": Optimizer(lr=1.0, schedule="warmup_stable_decay", warmup_epochs=1.0, decay_steps=15)})
    schedule = build_schedule(run, steps=20, rows_per_epoch=10, batch_rows=1)
    assert [round(schedule.lr(step), 3) for step in (9, 10, 11, 12, 20)] == [0.9, 1.0, 1.0, 0.9, 0.1]
