"""Runs under `harness launch`, struck at a moment of their own: noticed in time, ended whole, and gone on to the same losses."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import psutil

from tests.end_to_end.faults import Running, assert_same, evaluations, events, launched, losses, running, said
from tests.faults import cases
from tests.faults.cases import Asked, Case, Lost, rows


def wait(there, what: str, *, timeout_s: float = 60.0) -> float:
    """Wait until something is there; gives the time."""
    deadline = time.monotonic() + timeout_s
    while not there():
        assert time.monotonic() < deadline, f"{what} did not come in {timeout_s:g} s"
        time.sleep(0.02)
    return time.time()


def port_of(it: Running) -> int:
    """Where its ranks meet."""
    words = next(one.cmdline() for one in psutil.Process(it.child.pid).children() if "harness.launch.node" in one.cmdline())
    return int(words[words.index("--meet") + 1].rpartition(":")[2])


def is_open(port: int) -> bool:
    """Whether anybody listens there."""
    return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in psutil.net_connections("tcp"))


def resumes(run_dir) -> list[int]:
    """Steps of the checkpoints from which attempts went on."""
    return [event["step"] for event in events(run_dir, "resume")]


@rows(*cases.LOST)
def test_a_lost_run_goes_on_by_itself(case: Lost, course, fault, measured, tmp_path):
    run_dir, place = tmp_path / "run", fault(case.rank, case.phase, case.step, case.manner)
    words = [*case.words, *([f"launch.silence_seconds={cases.SILENCE_S}"] if case.within_s > cases.DEAD_S else [])]
    with running(course.run_file, run_dir, *words) as it:
        it.until((place / "struck").exists)
        port, struck = port_of(it), time.time()
        if case.number is not None:
            it.strike(case.number, ranks=list(case.ranks))
        noticed = wait(lambda: re.search(case.reason, it.output + said(run_dir)), case.reason, timeout_s=case.within_s)
        wait(lambda: events(run_dir, "relaunch"), "a new start")
        assert not is_open(port), "of the lost ranks"
        assert it.end() == 0, it.output
    lost = events(run_dir, "relaunch")[0]
    assert re.search(case.reason, lost["reason"]), lost
    measured.update(noticed=noticed - struck, ended=lost["time"] - struck)
    assert measured["ended"] < case.within_s + 10
    assert resumes(run_dir) == ([case.resumed] if case.resumed else []) or (case.words and not resumes(run_dir))
    assert len(events(run_dir, "relaunch")) == 1 and it.outcome().state == "done"
    assert_same(run_dir, course.run_dir)


@rows(*cases.ASKED)
def test_a_run_that_is_asked_stops_and_goes_on(case: Asked, course, fault, measured, tmp_path):
    run_dir, place = tmp_path / "run", fault(1, case.phase, case.step)
    before = signal.signal(case.number, signal.SIG_DFL)  # a launcher keeps what it inherits ignored
    try:
        with running(course.run_file, run_dir) as it:
            it.until((place / "struck").exists)
            struck = time.time()
            it.strike(case.number)
            time.sleep(0.3)
            (place / "go").touch()
            assert it.end() == 75, it.output
            measured["ended"] = time.time() - struck
    finally:
        signal.signal(case.number, before)
    assert it.outcome().state == "stopped" and not events(run_dir, "relaunch") and "Traceback" not in it.output
    assert measured["ended"] < 15 and 1 <= max(losses(run_dir)) < max(losses(course.run_dir))
    launched(course.run_file, run_dir)
    assert_same(run_dir, course.run_dir)


@rows(cases.NAN)
def test_a_number_that_is_none_on_one_rank_stops_all(case: Case, course, fault, measured, tmp_path):
    run_dir, place = tmp_path / "run", fault(1, "forward", 7, "nan")
    words = ["train.max_skipped_steps=1"]
    with running(course.run_file, run_dir, *words) as it:
        it.until((place / "struck").exists)
        struck = time.time()
        assert it.end() == 3, it.output
        measured["ended"] = time.time() - struck
    found = it.outcome()
    assert (found.state, found.step) == ("anomaly", 7) and "gradient was not finite" in found.reason, found
    assert [event["step"] for event in events(run_dir, "save")] == [5]
    launched(course.run_file, run_dir, *words)
    assert_same(run_dir, course.run_dir)


@rows(cases.STDOUT)
def test_nobody_needs_to_listen(case: Case, course, fault, measured, tmp_path):
    run_dir, place = tmp_path / "run", fault(0, "save", 5)
    command = [sys.executable, "-m", "harness", "launch", str(course.run_file), f"run_dir={run_dir}"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait((place / "struck").exists, "the save")
        child.stdout.close()
        (place / "go").touch()
        assert child.wait(timeout=120) == 0
    finally:
        child.kill()
        child.wait()
    assert "step 20: evaluation loss" in said(run_dir) and "BrokenPipe" not in said(run_dir)
    assert_same(run_dir, course.run_dir)


@rows(cases.TWICE)
def test_ctrl_c_to_one_of_two(case: Case, course, fault, measured, monkeypatch, tmp_path):
    one, other, place = tmp_path / "one", tmp_path / "other", fault(1, "backward", 7)
    with contextlib.ExitStack() as both:
        struck_one = both.enter_context(running(course.run_file, one))
        struck_one.until((place / "struck").exists)
        monkeypatch.delenv("FAULT")  # only the first stands still
        spared = both.enter_context(running(course.run_file, other))
        wait(lambda: len(losses(other)) >= 1, "the other's first step")
        struck = time.time()
        struck_one.strike(signal.SIGINT)
        time.sleep(0.3)
        (place / "go").touch()
        assert struck_one.end() == 75, struck_one.output
        measured["ended"] = time.time() - struck
        assert spared.end() == 0, spared.output
    assert struck_one.outcome().state == "stopped"
    assert_same(other, course.run_dir)
    launched(course.run_file, one)
    assert_same(one, course.run_dir)


@rows(cases.LOOP)
def test_a_run_that_dies_every_time_ends_with_its_reason(case: Case, course, fault, measured, tmp_path):
    run_dir = tmp_path / "run"
    fault(1, "backward", 1, "kill")
    output = launched(course.run_file, run_dir, code=1)
    assert "It ended 2 times in a row without a new checkpoint" in output and "SIGKILL in phase backward of step 1" in output
    states = [event["state"] for event in events(run_dir, "stop")]
    assert set(states[:-1]) == {"lost"} and states[-1] == "failed" and len(events(run_dir, "relaunch")) == 1


@rows(cases.END)
def test_a_rank_that_dies_when_all_is_done_spoils_nothing(case: Case, course, fault, measured, tmp_path):
    run_dir, place = tmp_path / "run", fault(1, "end", 20)
    with running(course.run_file, run_dir) as it:
        it.until((place / "struck").exists)
        it.until(lambda: events(run_dir, "finish"))
        os.kill(it.ranks()[1].pid, signal.SIGKILL)
        assert it.end() == 0, it.output
    assert it.outcome().state == "done" and not events(run_dir, "relaunch")
    assert losses(run_dir) == losses(course.run_dir) and evaluations(run_dir) == evaluations(course.run_dir)
