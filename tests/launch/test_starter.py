"""The node starter with real processes: what happens to signals, to the ranks that remain, and which outcome comes back."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from harness.formats.outcome import Outcome, read_outcome, write_outcome
from harness.launch import run as launches
from harness.launch import stacks
from tests.launch import fake_ranks

HOST = socket.gethostname()


def when(condition, then) -> threading.Thread:
    """Do something as soon as a condition holds, beside what the test does."""

    def watch() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def ups(folder: Path) -> list[dict]:
    """What the ranks wrote about themselves, by rank, once both did."""
    paths = [folder / f"up-{rank}" for rank in range(2)]
    return [json.loads(path.read_text()) for path in paths] if all(path.is_file() and path.stat().st_size for path in paths) else []


def all_gone(folder: Path) -> bool:
    """Whether neither rank nor starter runs, a moment after their files were closed; the machine's first process may leave an orphan a zombie."""
    pids = [pid for up in ups(folder) for pid in (up["pid"], up["parent"])]
    deadline = time.monotonic() + 2
    while (running := [pid for pid in pids if stacks.state(pid) not in ("", "Z")]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not running


@pytest.mark.parametrize(("manner", "code", "state"), [("done", 0, "done"), ("refuse", 2, "refused"), ("crash", 9, "failed"), ("segfault", 1, "failed")])
def test_the_outcome_is_what_the_ranks_told_else_what_the_starter_saw(tmp_path, manner, code, state):
    ended = launches.run(fake_ranks.plan(tmp_path, manner))
    assert (ended.code, ended.state) == (code, state)
    assert read_outcome(tmp_path) == ended
    assert [(up["world"], up["local"], up["port"]) for up in ups(tmp_path)] == [("2", "0", "12345"), ("2", "1", "12345")]
    assert manner != "segfault" or f"Rank 1 on {HOST} was ended by SIGSEGV" in ended.reason


def test_an_outcome_of_an_earlier_attempt_is_not_believed(tmp_path):
    write_outcome(tmp_path, Outcome("done", 0, "", 1, 1, time=time.time() - 60))
    assert launches.run(fake_ranks.plan(tmp_path, "crash")).code == 9


@pytest.mark.parametrize(("manner", "code", "state"), [("done", 0, "done"), ("refuse", 2, "refused"), ("crash", 9, "failed"), ("killed", 75, "lost")])
def test_where_the_outcome_is_not_seen_the_code_says_how_it_ended(tmp_path, manner, code, state):
    """The folder of the run is on the disk of another host."""
    kill = when(lambda: ups(tmp_path), lambda: manner == "killed" and os.kill(ups(tmp_path)[1]["pid"], signal.SIGKILL))
    plan = fake_ranks.plan(tmp_path, "ignore" if manner == "killed" else manner)
    ended = launches.run(replace(plan, run_dir=tmp_path / "elsewhere"))
    kill.join()
    assert (ended.code, ended.state) == (code, state) and f"ended with code {code}" in ended.reason, ended


def test_a_rank_that_fails_alone_is_heard_and_the_other_is_ended(tmp_path):
    started = time.monotonic()
    ended = launches.run(fake_ranks.plan(tmp_path, "one-fails"))
    assert (ended.code, ended.reason) == (1, "ValueError: of rank 1")
    assert time.monotonic() - started < 10 and all_gone(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_reaches_all_ranks_at_once_and_their_save_is_waited_for(tmp_path, number):
    before = signal.signal(number, signal.SIG_DFL)  # nohup and a shell's background ignore some, which is then respected
    try:
        thread = when(lambda: ups(tmp_path), lambda: os.kill(os.getpid(), number))
        assert launches.run(fake_ranks.plan(tmp_path, "work")).code == 75
        thread.join()
    finally:
        signal.signal(number, before)
    times = [float((tmp_path / f"asked-{rank}").read_text()) for rank in range(2)]
    assert abs(times[0] - times[1]) < 0.3 and all_gone(tmp_path)


def test_a_signal_before_there_are_ranks_ends_the_launch(tmp_path):
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    ended = launches.run(fake_ranks.plan(tmp_path, "done"))
    assert (ended.code, ended.state) in ((75, "stopped"), (0, "done")) and all_gone(tmp_path)


def test_a_third_request_kills_ranks_that_do_not_listen(tmp_path):
    def ask_three_times() -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    thread = when(lambda: ups(tmp_path), ask_three_times)
    assert launches.run(fake_ranks.plan(tmp_path, "ignore")).code == 75
    thread.join()
    assert all_gone(tmp_path)


LAUNCHER = """
import signal, subprocess, sys, time
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
if len(sys.argv) > 1:
    rank = subprocess.Popen([sys.executable, __file__], start_new_session=True)
    open(sys.argv[1], "w").write(str(rank.pid))
time.sleep(1000)
"""


def test_a_third_request_kills_ranks_under_a_launcher_that_does_not_count(tmp_path):
    """Such as mpirun, which passes one signal on, to ranks that save and do not hear it again."""
    script, up = tmp_path / "launcher.py", tmp_path / "up"
    script.write_text(LAUNCHER)

    def ask_three_times() -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    thread = when(lambda: up.is_file() and up.read_text(), ask_three_times)
    ended = launches.run(launches.LaunchPlan(((sys.executable, str(script), str(up)),), tmp_path, request=signal.SIGUSR1))
    thread.join()
    assert (ended.code, ended.state) == (75, "stopped") and stacks.state(int(up.read_text())) in ("", "Z")


def test_a_killed_rank_is_seen_and_the_other_ended_within_seconds(tmp_path):
    killed = []

    def kill() -> None:
        killed.append(time.monotonic())
        os.kill(ups(tmp_path)[1]["pid"], signal.SIGKILL)

    thread = when(lambda: ups(tmp_path), kill)
    ended = launches.run(fake_ranks.plan(tmp_path, "ignore"))
    thread.join()
    assert time.monotonic() - killed[0] < 5 and all_gone(tmp_path)
    assert (ended.code, ended.state) == (75, "lost") and f"Rank 1 on {HOST} was ended by SIGKILL" in ended.reason, ended


@pytest.mark.parametrize("manner", ["hang", "ignore"])
def test_a_silent_rank_is_named_with_its_phase_and_all_are_ended(tmp_path, manner):
    """Asleep in the middle of a backward, or stopped from outside."""
    thread = when(lambda: ups(tmp_path), lambda: manner == "ignore" and (time.sleep(1), os.kill(ups(tmp_path)[1]["pid"], signal.SIGSTOP)))
    ended = launches.run(fake_ranks.plan(tmp_path, manner, silence_s=2.0))
    thread.join()
    assert (ended.code, ended.state) == (75, "lost") and all_gone(tmp_path), ended
    assert ended.reason.startswith(f"Rank 1 on {HOST} " + ("was silent" if manner == "hang" else "stood still")), ended
    assert manner == "ignore" or "in phase backward of step 30; the bound is 2 s" in ended.reason
    kernel = (tmp_path / "attempts" / "0001" / "logs" / "stacks-00001-kernel.txt").read_text()
    assert "Rank 1 on" in kernel and ("state T" in kernel) == (manner == "ignore")


def test_ranks_whose_starter_is_killed_are_asked_and_waited_for(tmp_path):
    thread = when(lambda: ups(tmp_path), lambda: os.kill(ups(tmp_path)[0]["parent"], signal.SIGKILL))
    assert launches.run(fake_ranks.plan(tmp_path, "work")).code == 75
    thread.join()
    assert all_gone(tmp_path)


def test_ranks_that_outlive_a_killed_starter_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(launches, "LEASH_S", 1.0)
    thread = when(lambda: ups(tmp_path), lambda: os.kill(ups(tmp_path)[0]["parent"], signal.SIGKILL))
    assert launches.run(fake_ranks.plan(tmp_path, "ignore")).code == 1
    thread.join()
    assert all_gone(tmp_path)


def test_what_ranks_leave_behind_is_ended(tmp_path):
    assert launches.run(fake_ranks.plan(tmp_path, "child")).code == 0
    assert not [one for one in psutil.process_iter(["cmdline"]) if any(str(tmp_path) in word for word in one.info["cmdline"] or [])]


def test_what_they_leave_behind_in_shared_memory_is_taken_away(tmp_path):
    """A rank that dies before all have mapped its segment cannot do so itself."""
    left = [Path("/dev/shm", f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_{rank}") for port, rank in ((12346, 0), (12346, 1), (12347, 0))]
    try:
        for path in left:
            path.touch()
        assert launches.run(fake_ranks.plan(tmp_path, "done", port=12346)).code == 0
        assert [path.exists() for path in left] == [False, False, True], "of this job alone"
    finally:
        for path in left:
            path.unlink(missing_ok=True)


def test_what_is_private_is_read_by_this_user_alone_and_gone_at_the_end(tmp_path):
    path = tmp_path / "launch" / "environment"
    code = f"import os, sys; print(oct(os.stat({str(path)!r}).st_mode), open({str(path)!r}).read(), sys.stdin.read(), file=open({str(tmp_path / 'seen')!r}, 'a'))"
    plan = launches.LaunchPlan(((sys.executable, "-c", code),) * 2, tmp_path, private={path: "HF_TOKEN=a"}, stdin="HF_TOKEN=b\n")
    assert launches.run(plan).code == 0
    assert (tmp_path / "seen").read_text().splitlines() == ["0o100600 HF_TOKEN=a HF_TOKEN=b", ""] * 2 and not path.exists()


def test_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    launches.run(fake_ranks.plan(tmp_path, "done"))
    assert signal.getsignal(signal.SIGTERM) is before
