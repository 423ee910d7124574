"""The lock of a run's folder: truth on one machine, and beside a sign of life between machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.formats import running

HOLD = """
import os, sys, time
from pathlib import Path
from harness.formats import running
machine, sign = sys.argv[2:]
running._machine = lambda: machine
running.BEAT_S = 0.2 if sign == "alive" else 1e9
running.hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the folder, on a machine of a name, and gives a sign of life or none after the first."""
    started = []

    def start(machine: str, sign: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path), machine, sign]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(child)
        assert child.stdout.readline() == "held\n"
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(running, "DEAD_S", 1.5)
    monkeypatch.setattr(running, "BEAT_S", 0.2)
    monkeypatch.setattr(running, "_held", [])


def test_on_one_machine_the_kernel_knows(tmp_path, holder):
    child = holder(running._machine(), "silent")
    os.utime(tmp_path / "attempts" / "running", (1, 1))
    assert running.is_occupied(tmp_path)
    with pytest.raises(running.Occupied, match=f"process {child.pid} on "):
        running.hold(tmp_path)
    child.kill()
    child.wait()
    assert not running.is_occupied(tmp_path)
    running.hold(tmp_path)
    assert json.loads((tmp_path / "attempts" / "running").read_text())["pid"] == os.getpid()


def test_another_machine_that_lives_is_not_disturbed(tmp_path, holder):
    holder("another", "alive")
    assert running.is_occupied(tmp_path)
    with pytest.raises(running.Occupied, match="control/stop"):
        running.hold(tmp_path)


def test_the_lock_of_a_machine_that_is_gone_stops_nobody(tmp_path, holder, monkeypatch):
    """Its file server keeps it; a launch right after its last sign is refused, a rank waits and goes on."""
    said: list[str] = []
    monkeypatch.setattr(running, "say", said.append)
    child = holder("another", "silent")
    assert running.is_occupied(tmp_path)
    running.hold(tmp_path)
    assert said and str(child.pid) in said[0] and json.loads((tmp_path / "attempts" / "running").read_text())["pid"] == os.getpid()


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, holder, monkeypatch):
    def lockf(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    holder(running._machine(), "alive")
    monkeypatch.setattr(running.fcntl, "lockf", lockf)
    assert not running.is_occupied(tmp_path)


def test_a_rank_knows_the_job_of_its_own_rank_0(tmp_path, holder, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "host-0")
    monkeypatch.setenv("MASTER_PORT", "1234")
    holder(running._machine(), "alive")
    assert running.is_foreign(tmp_path, main=True) and not running.is_foreign(tmp_path, main=False)
    monkeypatch.setenv("MASTER_PORT", "1235")
    assert running.is_foreign(tmp_path, main=False)
    assert not running.is_foreign(tmp_path / "none", main=True)


def test_a_folder_that_is_not_there_is_nobodys(tmp_path: Path):
    assert not running.is_occupied(tmp_path / "none") and not (tmp_path / "none").exists()
