"""What a log says of the time that is left: from the steps after the first, whose compiling and evaluation tell nothing of the others."""

from __future__ import annotations

import re

import pytest

from harness.telemetry import display


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def test_the_first_step_tells_nothing_of_the_others(clock, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(display, "say", lines.append)
    shown = display.Display(100, done=20)
    clock[0] += 500.0
    for step in range(21, 101):
        clock[0] += 1.0
        shown.step(step, {"train/loss": 2.0, "speed/tokens_per_second": 9.0})
    assert lines[0] == "step 21/100  loss 2.0000  9 tokens/s" and lines[-1] == "step 100/100  loss 2.0000  9 tokens/s"
    assert len(lines) == 9, lines
    assert [re.search(r"tokens/s  (.+) left$", line)[1] for line in lines[1:3]] == ["1:09", "59 s"]


def test_a_line_tells_what_is_known(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(display, "say", lines.append)
    values = {"train/loss": 2.0, "optim/lr": 5e-5, "optim/grad_norm": 1.25, "speed/tokens_per_second": 2036.0}
    display.Display(1, done=0).step(1, values)
    display.Display(1, done=0).step(1, values | {"speed/mfu": 0.357, "memory/device_peak_bytes": 12.7 * 2**30})
    assert lines == [
        "step 1/1  loss 2.0000  lr 5e-05  gradient norm 1.25  2,036 tokens/s",
        "step 1/1  loss 2.0000  lr 5e-05  gradient norm 1.25  2,036 tokens/s  MFU 35.7%  GPU 12.7 GiB",
    ]
