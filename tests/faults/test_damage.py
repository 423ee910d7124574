"""A run that was lost goes on from what holds, whatever became of its files."""

from __future__ import annotations

import os
import re
from pathlib import Path

from harness.checkpoint import shelf
from tests.end_to_end.faults import assert_same, events, launched
from tests.faults import cases
from tests.faults.cases import Damage, rows


def _first_file(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def _cut(path: Path, *, by: int) -> None:
    os.truncate(path, path.stat().st_size - by)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def _journals(newest: Path) -> None:
    run_dir = newest.parents[1]
    (run_dir / "outcome.json").write_text('{"state": "do')
    for name in ("metrics.jsonl", "events.jsonl"):
        _cut(run_dir / name, by=9)


def _all(newest: Path) -> None:
    for _, folder in shelf.committed(newest.parents[1]):
        _flip(_first_file(folder))


DAMAGES = {
    "truncated": lambda newest: _cut(_first_file(newest), by=4),
    "bit-flipped": lambda newest: _flip(_first_file(newest)),
    "missing": lambda newest: _first_file(newest).unlink(),
    "marker": lambda newest: (newest.parent / shelf.MARKER).write_text("step-000400\n"),
    "journals-cut": _journals,
    "all-damaged": _all,
}


@rows(*cases.DAMAGE)
def test_a_damaged_run_goes_on_from_what_holds(case: Damage, course, measured, tmp_path):
    run_dir = course.interrupted(tmp_path / "run")
    before = len(events(run_dir, "start"))
    newest = run_dir / "checkpoints" / "step-000010"
    DAMAGES[case.name](newest)
    output = launched(course.run_file, run_dir, code=0 if case.resumed else 2)
    skipped = [event["reason"] for event in events(run_dir, "skip")]
    assert len(skipped) == (1 if case.told and case.resumed else 2 if case.told else 0), skipped
    assert all(re.search(case.told, reason) and "Checkpoint passed over" in output for reason in skipped)
    assert not case.told or newest.with_name("step-000010.damaged").is_dir()
    if not case.resumed:
        assert "Every checkpoint of this run is damaged" in output and not newest.exists()
        return
    assert len(events(run_dir, "start")) == before + 1 and [event["step"] for event in events(run_dir, "resume")] == [case.resumed]
    assert_same(run_dir, course.run_dir)
