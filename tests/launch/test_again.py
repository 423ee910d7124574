"""Which jobs are started again: told from the run's ledger and outcome, as they are after real ends."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from harness.errors import Refused
from harness.formats import ledger, outcome
from harness.formats.outcome import Outcome, read_outcome
from harness.launch import again, node
from harness.launch.local import free_port
from tests.end_to_end.faults import write_run

LAUNCH, START, SAVE = {"kind": "launch", "job": "j"}, {"kind": "start"}, {"kind": "save", "checkpoint": "step-000004"}
LOST, STOPPED, FINISH = {"kind": "stop", "state": "lost"}, {"kind": "stop", "state": "stopped"}, {"kind": "finish"}


@pytest.mark.parametrize(("events", "count"), [
    ([], 0),
    ([LAUNCH, START, LOST, LAUNCH, START], 2),
    ([LAUNCH, START, SAVE, LOST, LAUNCH, START], 1),
    ([LAUNCH, START, STOPPED, SAVE], 0),
    ([{"kind": "launch", "job": "another"}, START, LOST, LAUNCH], 1),
    ([LAUNCH, LOST, LOST, LAUNCH, LOST, LAUNCH, START], 1),  # twice a host did not come; the starter may tell it once more
    ([LAUNCH, {"kind": "stop", "state": "failed"}, LAUNCH], 2),
    ([LAUNCH, START, {"kind": "save", "seconds": 1.0}], 1),
])
def test_starts_in_vain(events, count):
    assert again.starts_in_vain(events, "j") == count


@pytest.mark.parametrize(("events", "is_over"), [
    ([LAUNCH, START], False), ([LAUNCH, START, FINISH], True), ([LAUNCH, START, FINISH, LAUNCH], False), ([LAUNCH, {"kind": "asked"}, STOPPED], True),
])
def test_a_job_is_over_when_its_run_is_done_or_was_asked_to_stop(events, is_over):
    assert bool(again.why_over(events, "j")) is is_over


def _start(run_dir, *, ends: str | None = None, code: int = 75, saves: bool = False) -> str:
    why = again.begin(run_dir, "j", restarts=2, writes=True)
    if not why:
        ledger.append(run_dir, "start", attempt=1)
        if saves:
            ledger.append(run_dir, "save", step=1, checkpoint="step-000001")
        if ends:
            outcome.write_outcome(run_dir, Outcome(ends, code, f"it {ends}", 1, 1))
            ledger.append(run_dir, "finish" if code == 0 else "stop", state=ends)
    return why


def test_a_job_is_not_started_for_ever(tmp_path):
    run_dir = tmp_path / "run"
    for _ in range(3):
        assert not _start(run_dir, ends="lost")
    assert not again.begin(run_dir, "j", restarts=2, writes=False)
    with pytest.raises(Refused, match="3 times in a row without a new checkpoint, the last time so: it lost"):
        _start(run_dir)
    told = read_outcome(run_dir)
    assert (told.state, told.code) == ("refused", 2)
    assert not again.begin(run_dir, "a new job", restarts=2, writes=True)


def test_checkpoints_let_it_go_on(tmp_path):
    for _ in range(9):
        assert not _start(tmp_path, ends="lost", saves=True)


def test_done_is_done_on_every_host_but_a_new_job_goes_on(tmp_path):
    assert not _start(tmp_path, ends="done", code=0)
    assert [again.begin(tmp_path, "j", restarts=2, writes=writes) for writes in (True, False)] == ["The run is done."] * 2
    assert not again.begin(tmp_path, "k", restarts=2, writes=True)


@pytest.mark.parametrize(("state", "code", "step", "answer"), [
    ("done", 0, 4, (False, 0)), ("stopped", 75, 4, (True, 75)), ("lost", 75, 0, (True, 75)), ("failed", 1, 0, (False, 1)), ("failed", 1, 4, (True, 1)),
    ("refused", 2, 4, (False, 2)), ("anomaly", 3, 4, (False, 3)), ("check failed", 4, 4, (False, 4)),
])
def test_after_an_end(tmp_path, state, code, step, answer):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
    _start(tmp_path, ends=state, code=code)
    assert again.after(tmp_path, "j", restarts=2, since=0.0, code=143) == answer


def test_after_an_end_without_an_outcome_the_code_counts(tmp_path):
    _start(tmp_path, ends="done", code=0)
    late = read_outcome(tmp_path).time + 1
    ledger.append(tmp_path, "launch", job="j")
    assert again.after(tmp_path, "j", restarts=2, since=late, code=75) == (True, 75)
    assert again.after(tmp_path, "j", restarts=2, since=late, code=9) == (False, 9)


def test_a_crash_loop_ends_with_its_reason(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    for number in range(3):
        _start(tmp_path, ends="failed", code=1)
        words = [str(tmp_path), "--job", "j", "--restarts", "2", "--since", "0", "--code", "1"]
        assert again.main(words) == 0
        assert capsys.readouterr().out.split()[-2:] == (["again", "1"] if number < 2 else ["end", "1"])
    assert read_outcome(tmp_path).reason == "It ended 3 times in a row without a new checkpoint, the last time so: it failed"


@pytest.mark.parametrize(("slots", "environment", "number"), [
    ((4,), {"SLURM_NODEID": "3"}, 0), ((1, 1), {"SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2"}, 1), ((1, 1, 1), {"JOB_COMPLETION_INDEX": "2"}, 2),
    ((1, 1), {}, None), ((1, 1), {"JOB_COMPLETION_INDEX": "2"}, None), ((1, 1), {"SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "3"}, None),
])
def test_the_number_of_a_host(slots, environment, number):
    if number is None:
        with pytest.raises(Refused, match="the job has 2 hosts"):
            node.node_number(slots, environment)
    else:
        assert node.node_number(slots, environment) == number


@pytest.mark.slow
def test_a_start_in_which_no_peer_came_is_lost_and_does_not_count(tmp_path):
    lines = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(20)]
    path = write_run(tmp_path, lines[:16], lines[16:], launch={"ranks": None})
    for _ in range(2):
        since, meet = time.time(), f"127.0.0.1:{free_port()}"
        words = ["--slots", "1,1", "--node", "0", "--meet", meet, "--job", "j", "--restarts", "0", path, "engine.timeout_minutes=0.02"]
        done = subprocess.run([sys.executable, "-m", "harness.launch.node", *map(str, words)], capture_output=True, text=True, timeout=120)
        told = outcome.read_outcome(tmp_path / "run")
        assert (done.returncode, told.state) == (75, "lost") and f"Of 2 ranks only 1 came to {meet} within" in told.reason, (done, told)
        assert again.after(tmp_path / "run", "j", restarts=0, since=since, code=75) == (True, 75)
