"""A trace of a few steps: which are recorded, what comes of it, and that a failure of it is no failure of the run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from harness.train.trace import STEPS, Tracer


def step() -> None:
    torch.ones(8, 8) @ torch.ones(8, 8)


def tracer(folder: Path, *, takes_part: bool = True) -> tuple[Tracer, list[dict]]:
    notes: list[dict] = []
    return Tracer(folder, rank=3, takes_part=takes_part, note=lambda kind, **facts: notes.append({"kind": kind} | facts)), notes


@pytest.fixture
def words(monkeypatch) -> list[str]:
    """What it says."""
    found: list[str] = []
    monkeypatch.setattr("harness.train.trace.say", found.append)
    return found


def names(path: Path) -> list[str]:
    return [event["name"] for event in json.loads(gzip.open(path).read())["traceEvents"] if event.get("cat") in ("cpu_op", "user_annotation")]


def test_the_steps_after_a_request(tmp_path):
    folder = tmp_path / "attempts" / "0001" / "traces"
    it, notes = tracer(folder)
    worked = []
    for number in range(1, 12):
        if number in (3, 4, 8):
            it.ask()
        step()
        worked.append(it.after_step(number))
    assert worked == [False, False, True, True, True, True, False, True, True, True, True], "a request while steps are recorded changes nothing"
    first, second = sorted(folder.glob("*.gz"))
    assert first.name == "step-000004-rank-00003.pt.trace.json.gz" and second.name.startswith("step-000009")
    assert notes[0] == {"kind": "trace", "first": 4, "last": 6, "path": "attempts/0001/traces/step-000004-rank-00003.pt.trace.json.gz"}
    found = names(first)
    assert [name for name in found if name.startswith("step ")] == ["step 4", "step 5", "step 6"] and found.count("aten::mm") == STEPS
    assert "aten::mm" in first.with_name("step-000004-rank-00003.txt").read_text()


def test_one_that_takes_no_part(tmp_path):
    it, notes = tracer(tmp_path / "traces", takes_part=False)
    it.ask()
    assert not any(it.after_step(number) for number in range(1, 9)) and not notes and not (tmp_path / "traces").exists()


def test_a_trace_that_cannot_be_written(tmp_path, words):
    (tmp_path / "traces").write_text("in the way")
    it, notes = tracer(tmp_path / "traces")
    it.ask()
    for number in range(1, 9):
        step()
        it.after_step(number)
    assert not notes and "the trace failed" in words[-1]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        step()  # the one before has let go


def test_a_run_that_ends_within(tmp_path, words):
    it, notes = tracer(tmp_path / "traces")
    it.ask()
    it.after_step(1)
    it.close()
    it.close()
    assert not notes and "before the trace was whole" in words[-1]
