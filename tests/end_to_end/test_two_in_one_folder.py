"""Two runs never train in one folder: the second is refused, by the launcher and by its own rank 0, and the first does not notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.conftest import deepspeed, harness
from tests.end_to_end.faults import Running, armed, events, launched, losses, running, write_run


@pytest.fixture
def run_file(tmp_path) -> Path:
    lines = [{"question": f"What is the tone of {n}?", "answer": f"It is {n * 7 % 23}, more or less."} for n in range(60)]
    return write_run(tmp_path, lines[:50], lines[50:])


@pytest.fixture
def standing(run_file, tmp_path, monkeypatch):
    """A run whose rank 1 stands in step 3 until it may go on."""
    for name, value in armed(1, "backward", 3, tmp_path).items():
        monkeypatch.setenv(name, value)
    with running(run_file, tmp_path / "run") as first:
        first.until((tmp_path / "struck").exists)
        yield first


def ends_well(first: Running, place: Path) -> None:
    (place / "go").touch()
    assert first.end() == 0, first.output
    assert first.outcome().state == "done" and list(losses(first.run_dir)) == list(range(1, 9))
    assert [event["attempt"] for event in events(first.run_dir, "start")] == [1] and not events(first.run_dir, "stop")


def test_the_second_launch_is_refused(run_file, standing, tmp_path):
    second = harness("launch", run_file, f"run_dir={tmp_path / 'run'}")
    assert second.code == 2 and f"A run is under way in {tmp_path / 'run'}: process {standing.ranks()[0].pid} on " in second.output, second.output
    assert "control/stop" in second.output and "Traceback" not in second.output
    ends_well(standing, tmp_path)
    launched(run_file, tmp_path / "run", "train.steps=10")


@pytest.mark.slow
@pytest.mark.parametrize("word", ["launch.ranks=2", "train.seed=5"])
def test_a_second_job_that_is_refused_for_another_reason_leaves_no_trace(run_file, standing, tmp_path, word):
    """Before it has looked whether another trains there: an outcome of its own would be taken for that of the run."""
    run_dir = tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file() and path.name != "running"}
    second = harness("train", run_file, "launch.ranks=1", f"run_dir={run_dir}", word)
    assert second.code == 2 and "where:" in second.output and "A run is under way" not in second.output, second.output
    assert {path: path.stat().st_mtime_ns for path in before if path.exists()} == before and not (run_dir / "outcome.json").exists()
    assert not list(run_dir.glob("attempts/*/logs/*.end.json"))
    ends_well(standing, tmp_path)


@pytest.mark.slow
def test_the_second_job_of_deepspeed_is_refused(run_file, standing, tmp_path):
    """No launcher of ours looks first; the ranks themselves find out, and write nothing."""
    second = deepspeed("train", run_file, f"run_dir={tmp_path / 'run'}")
    assert second.code == 2 and "A run is under way" in second.output, second.output
    ends_well(standing, tmp_path)
