"""The wall clock of runs that are written here line by line, sorted into what it went to."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from harness.errors import Refused
from harness.review.goodput import DETECTION, EVALUATION, FIRST_BATCH, LOST, NOBODY, RELAUNCH, SAVING, SHUTDOWN, TRAINING, WAITING, goodput

UP = {"start": 2.0, "meet": 1.0, "build": 3.0, "load": 1.0}
"""Seven seconds before the first batch."""


class Script:
    """A run folder that is told second by second."""

    def __init__(self, folder):
        self.folder, self.attempt = folder, 0

    def event(self, kind, when, **facts):
        with open(self.folder / "events.jsonl", "a") as stream:
            stream.write(json.dumps({"version": 1, "time": when, "kind": kind} | facts) + "\n")

    def line(self, number, when, tag="train/loss", /, **phases):
        with open(self.folder / "metrics.jsonl", "a") as stream:
            stream.write(json.dumps({"attempt": self.attempt, "step": number, "time": when, tag: 1.0, "phases": phases}) + "\n")

    def start(self, began, resumed=None):
        self.attempt += 1
        self.began = began
        self.event("start", began + 4, attempt=self.attempt, began=began, phases={"start": 2.0, "meet": 1.0})
        if resumed is not None:
            self.event("resume", began + 7, step=resumed)

    def stop(self, when, state, **facts):
        self.event("finish" if state == "done" else "stop", when, attempt=self.attempt, state=state, began=self.began, **facts)


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path)


def test_an_undisturbed_run(script, tmp_path):
    script.start(100.0)
    script.line(1, 109.0, **UP, data=0.5, forward=1.0, backward=0.5)
    script.event("running", 109.0, step=1, phases=UP | {"data": 0.5, "forward": 1.0, "backward": 0.5})
    script.line(2, 111.0, data=0.5, forward=1.0, step=0.5)
    script.line(2, 113.0, "eval/loss", evaluate=2.0)
    script.event("save", 114.0, step=2, checkpoint="step-000002")
    script.stop(114.5, "done", phases=UP | {"data": 1.0, "forward": 2.0, "backward": 0.5, "step": 0.5, "evaluate": 2.0, "save": 1.5}, waited_s=0.0)
    found = goodput(tmp_path)
    assert found.wall_s == 14.5 and found.unaccounted_s == 0.0 and found.share == pytest.approx(3.0 / 14.5)
    assert {name: seconds for name, seconds in found.seconds.items() if seconds and "start-up" not in name} == {TRAINING: 3.0, WAITING: 0.5, EVALUATION: 2.0, SAVING: 1.5}
    assert found.seconds[FIRST_BATCH] == 0.5 and found.seconds["start-up: build"] == 3.0
    (start,) = found.starts
    assert (start.attempt, start.state, start.first_step_s) == (1, "done", 9.0)
    assert start.phases == {"import": 2.0, "meet": 1.0, "build": 3.0, "load": 1.0, "first batch": 0.5, "first step": 1.5}


def test_steps_that_were_done_again_are_lost_and_ends_are_told_apart(script, tmp_path):
    script.start(100.0)
    script.line(1, 108.0, **UP, forward=1.0)
    script.event("running", 108.0, step=1, phases=UP | {"forward": 1.0})
    script.line(2, 109.0, forward=1.0)
    script.event("save", 110.0, step=2, checkpoint="step-000002")
    script.line(3, 111.0, save=1.0, forward=1.0)
    script.line(4, 112.0, forward=1.0)
    # half a step more, then a rank stands still for eight seconds; the starter needs half a second to say so, and the launcher one to go on
    script.stop(121.0, "lost", phases=UP | {"forward": 4.5, "save": 1.0}, waited_s=8.0, gone=120.5)
    script.event("relaunch", 122.0, pause_s=1.0)
    script.start(124.0, resumed=2)
    script.line(3, 132.0, **UP, forward=1.0)
    script.event("running", 132.0, step=3, phases=UP | {"forward": 1.0})
    # asked to stop, and started again by somebody a minute later
    script.event("save", 133.0, step=3, checkpoint="step-000003")
    script.stop(133.0, "stopped", phases=UP | {"forward": 1.0, "save": 1.0}, waited_s=0.0)
    script.start(193.0, resumed=3)
    script.line(4, 201.0, **UP, forward=1.0)
    found = goodput(tmp_path)
    assert found.unaccounted_s == pytest.approx(0.0) and found.wall_s == 101.0
    told = {TRAINING: 4.0, LOST: 2.5, SAVING: 2.0, DETECTION: 8.0, SHUTDOWN: 1.5, RELAUNCH: 2.0, NOBODY: 60.0}
    assert {name: seconds for name, seconds in found.seconds.items() if seconds and "start-up" not in name} == pytest.approx(told)


def test_a_start_that_dies_is_start_up_and_what_follows_is_not_its_end(script, tmp_path):
    """Told by the starter alone, with the number of the attempt before; a checkpoint passed over is told before the next one begins."""
    script.start(100.0)
    script.line(1, 108.0, **UP, forward=1.0)
    script.stop(109.0, "lost", phases=UP | {"forward": 1.0}, waited_s=1.0, gone=109.0)
    script.event("relaunch", 109.0)
    script.event("stop", 116.0, attempt=1, state="lost", began=110.0, phases={"start": 2.0, "meet": 1.0}, waited_s=3.0, gone=116.0)
    script.event("relaunch", 116.0)
    script.event("skip", 119.0, reason="damaged")
    script.start(117.0)
    script.line(1, 125.0, **UP, forward=1.0)
    found = goodput(tmp_path)
    assert found.unaccounted_s == pytest.approx(0.0) and [(one.attempt, one.state) for one in found.starts] == [(1, "lost"), (0, "lost"), (2, "")]
    assert found.seconds["start-up: import"] == 6.0 and found.seconds[LOST] == 1.0 and found.seconds[DETECTION] == 4.0 and found.seconds[RELAUNCH] == 2.0


def test_an_attempt_whose_host_is_gone_ends_with_the_last_that_it_told(script, tmp_path):
    script.start(100.0)
    script.line(1, 108.0, **UP, forward=1.0)
    script.event("stop", 150.0, attempt=1, state="lost")
    script.event("launch", 151.0, job="7")
    script.event("skip", 155.0, reason="damaged")
    script.start(152.0)
    script.line(1, 160.0, **UP, forward=1.0)
    found = goodput(tmp_path)
    assert found.seconds[NOBODY] == 44.0 and found.unaccounted_s == pytest.approx(0.0)


def test_a_rollback_takes_steps_back_within_an_attempt(script, tmp_path):
    script.start(100.0)
    script.line(1, 108.0, **UP, forward=1.0)
    script.line(2, 109.0, forward=1.0)
    script.line(3, 110.0, forward=1.0)
    script.line(1, 110.5, "rolled_back_from")
    script.line(2, 112.0, load=0.5, forward=1.5)
    found = goodput(tmp_path)
    assert found.unaccounted_s == pytest.approx(0.0) and found.seconds[LOST] == 2.5 and found.seconds[TRAINING] == 2.5


def test_what_is_written_after_the_last_checkpoint_of_a_dead_run_is_lost(script, tmp_path):
    script.start(100.0)
    script.line(1, 108.0, **UP, forward=1.0)
    script.event("save", 108.0, step=1, checkpoint="step-000001")
    script.line(2, 109.0, forward=1.0)
    assert goodput(tmp_path).seconds[LOST] == 0.0, "it still runs"
    script.stop(110.0, "failed", phases=UP | {"forward": 2.5}, waited_s=0.5)
    found = goodput(tmp_path)
    assert found.seconds[LOST] == pytest.approx(1.5) and found.seconds[TRAINING] == 1.0 and found.unaccounted_s == pytest.approx(0.0)


def test_no_run_is_refused_and_the_table_is_plain_without_a_terminal(script, tmp_path):
    with pytest.raises(Refused, match="holds no run"):
        goodput(tmp_path)
    script.start(100.0)
    script.line(1, 108.0, **UP, forward=1.0)
    done = subprocess.run([sys.executable, "-m", "harness", "review", str(tmp_path)], capture_output=True, text=True, check=True)
    assert "training that stands" in done.stdout and "goodput 12.5% of 8.00 s in 1 attempt" in done.stdout and "\x1b" not in done.stdout
    done = subprocess.run([sys.executable, "-m", "harness", "review", str(tmp_path), "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) | goodput(tmp_path).as_json() == json.loads(done.stdout)
