"""A run on this machine: the `deepspeed` command as a value, and a start that passes on what it is asked."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from harness.config.load import Loaded
from harness.errors import EXIT_FAILURE
from harness.formats.outcome import read_outcome
from harness.launch.operators import environment, num_gpus

__all__ = ["LaunchPlan", "num_gpus", "plan", "run"]
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REAP_SECONDS = 10.0


@dataclass(frozen=True)
class LaunchPlan:
    """What is started, and where its outcome will be.

    Attributes:
        command: the whole command.
        ranks: it starts.
        run_dir: of the run.
    """

    command: tuple[str, ...]
    ranks: int
    run_dir: Path


def plan(loaded: Loaded, *, run_file: str, overrides: list[str]) -> LaunchPlan:
    """The `deepspeed` command for this machine: as many ranks as the run file asks for, else as there are GPUs."""
    gpus = 0 if loaded.run.engine.device == "cpu" else num_gpus()
    ranks = loaded.run.launch.ranks or max(1, gpus)
    command = (
        str(Path(sys.prefix) / "bin" / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(_free_port()), "--no_local_rank",
        "--module", "harness", "train", run_file, *overrides,
    )
    return LaunchPlan(command, ranks, loaded.run.run_path)


def run(plan: LaunchPlan) -> int:
    """Start the ranks, wait until all are gone, and answer with the outcome's code.

    SIGTERM, SIGINT and SIGUSR1 are passed to every rank at once, never to DeepSpeed's launchers, which would not wait.
    """
    started = time.time()
    child = subprocess.Popen(plan.command, env=os.environ | environment(), start_new_session=True)
    before = {number: signal.signal(number, lambda number, frame: _pass_on(number, frame, child.pid)) for number in STOPS}
    try:
        code = child.wait()
        _reap(child.pid)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    outcome = read_outcome(plan.run_dir)
    if outcome is not None and outcome.time >= started:
        return outcome.code
    return code if code > 0 else EXIT_FAILURE


def _pass_on(number: int, frame: FrameType | None, runner: int) -> None:
    for process in _ranks(runner):
        try:
            process.send_signal(number)
        except psutil.Error:
            continue


def _ranks(runner: int) -> list[psutil.Process]:
    """The rank processes below DeepSpeed's runner and launcher."""
    found = []
    for process in _session(runner):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if "deepspeed.launcher.launch" not in words and "harness" in words and "train" in words and "-m" in words:
            found.append(process)
    return found


def _session(leader: int) -> list[psutil.Process]:
    """Every process of the session that the runner leads, orphans included."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.pid != leader:
                found.append(process)
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue
    return found


def _reap(leader: int) -> None:
    """Wait for ranks that outlived their launcher; end those that stay."""
    deadline = time.monotonic() + REAP_SECONDS
    while left := [p for p in _session(leader) if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        if time.monotonic() > deadline:
            for process in left:
                process.kill()
            return
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
