"""Time through the real launcher: what the ledger says of a start adds up, and that of a run with a killed rank too."""

from __future__ import annotations

import signal

import pytest

from harness.formats.outcome import last_step
from harness.review.goodput import LOST, RELAUNCH, SAVING, TRAINING, goodput
from tests.end_to_end.conftest import harness
from tests.end_to_end.faults import events, running


@pytest.mark.slow
def test_the_time_of_a_run_that_lost_a_rank_adds_up(run_file, tmp_path):
    assert harness("prepare", run_file).code == 0
    with running(run_file, tmp_path / "run", "launch.restarts=3", "train.steps=40", "checkpoint.every_steps=5", "evaluation.every_steps=10") as it:
        it.until(lambda: last_step(it.run_dir) >= 12)
        it.strike(signal.SIGKILL, ranks=[0])
        assert it.end() == 0, it.output
    found = goodput(it.run_dir)
    assert abs(found.unaccounted_s) < 0.02 * found.wall_s, found.as_json()
    assert len(found.starts) == 2 and min(found.seconds[name] for name in (TRAINING, LOST, SAVING, RELAUNCH)) > 0.0, found.as_json()
    starts = {event["attempt"]: event["began"] for event in events(it.run_dir, "start")}
    for attempt, running_ in enumerate(events(it.run_dir, "running"), start=1):
        took_s, told_s = running_["time"] - starts[attempt], sum(running_["phases"].values())
        assert told_s == pytest.approx(took_s, rel=0.03), running_
        assert {"start", "meet", "build", "load", "data"} <= running_["phases"].keys()
    ends = events(it.run_dir, "stop")
    assert [(end["state"], end["began"]) for end in ends] == [("lost", starts[1])] and ends[0]["phases"]["forward"] > 0.0, "the killed rank's clock, told by its starter"
