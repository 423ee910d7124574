"""A run on this machine: the node starter's command as a value, and a start that waits until every process of it is gone."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from harness.config.load import Loaded
from harness.errors import EXIT_FAILURE, EXIT_RESUME_ME, Refused
from harness.formats.outcome import Outcome, newest_attempt, read_outcome
from harness.launch.operators import num_gpus
from harness.launch.starter import HELD, REQUESTS

__all__ = ["LaunchPlan", "free_port", "num_gpus", "plan", "render", "run"]
LEASH_S = 90.0
"""How long ranks may outlive a starter that was killed: they stop by themselves within a minute, after a save."""
FIRST_PORT = 20000


@dataclass(frozen=True)
class LaunchPlan:
    """What is started, and where its outcome will be.

    Attributes:
        command: the whole command.
        ranks: it starts.
        run_dir: of the run.
        environment: variables that every rank needs, besides those of this process.
    """

    command: tuple[str, ...]
    ranks: int
    run_dir: Path
    environment: dict[str, str] = field(default_factory=dict)


def plan(loaded: Loaded, *, run_file: str, overrides: list[str]) -> LaunchPlan:
    """The node starter's command for this machine: as many ranks as the run file asks for, else as there are GPUs."""
    gpus = 0 if loaded.run.engine.device == "cpu" else num_gpus()
    ranks = loaded.run.launch.ranks or max(1, gpus)
    command = render(ranks=ranks, port=free_port(), run_file=run_file, overrides=overrides)
    return LaunchPlan(command, ranks, loaded.run.run_path, {} if gpus else {"DS_ACCELERATOR": "cpu"})


def render(*, ranks: int, port: int, run_file: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """The words of the command.

    Args:
        ranks: processes on this machine.
        port: where they meet.
        run_file: path of the run file.
        overrides: `key.path=value` words.
    """
    return (sys.executable, "-m", "harness.launch.node", "--slots", str(ranks), "--master", f"127.0.0.1:{port}", run_file, *overrides)


def run(plan: LaunchPlan) -> Outcome:
    """Start the command, pass on what is asked, wait until all its processes are gone, and say how it ended."""
    job, started = _Job(), time.time()
    with job.listening():
        code = job.start(plan).wait()
        job.wait_for_all()
    outcome = read_outcome(plan.run_dir)
    if outcome is not None and outcome.time >= started:
        return outcome
    attempt, _ = newest_attempt(plan.run_dir)
    if job.asked:  # before a rank could listen: nothing was trained that a resume would lack
        return Outcome("stopped", EXIT_RESUME_ME, "Stopped on request before training began.", 0, attempt)
    return Outcome("failed", code if code > 0 else EXIT_FAILURE, f"The node starter ended with code {code}.", 0, attempt)


class _Job:
    """The processes of one launch: in sessions of their own, so that no terminal signals them behind our back.

    All of them hold the writing end of a pipe open; when its reading end comes to its end, the last of them is gone, however it died.
    """

    def __init__(self) -> None:
        self.asked = False
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe = -1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the requests; a hangup stays ignored where it was (nohup)."""
        before = {number: signal.getsignal(number) for number in REQUESTS}
        for number, handler in before.items():
            if number != signal.SIGHUP or handler != signal.SIG_IGN:
                signal.signal(number, self._pass_on)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self._pipe)

    def start(self, plan: LaunchPlan) -> subprocess.Popen[bytes]:
        """Start the command; a request that came before it is carried out now."""
        self._pipe, held = os.pipe()
        environment = os.environ | plan.environment | {HELD: str(held)}
        try:
            self._child = subprocess.Popen(plan.command, env=environment, start_new_session=True, pass_fds=(held,))
        finally:
            os.close(held)
        if self.asked:
            self._child.send_signal(signal.SIGTERM)
        return self._child

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._child is not None:
            self._child.send_signal(number)

    def wait_for_all(self) -> None:
        """Wait for processes that outlived their starter; in the end kill them."""
        if select.select([self._pipe], [], [], LEASH_S)[0]:
            return
        for pid in _holders(os.fstat(self._pipe).st_ino):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        select.select([self._pipe], [], [])


def _holders(inode: int) -> list[int]:
    """Other processes that hold an end of a pipe."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(path) == f"pipe:[{inode}]":
                found.add(int(path.parts[2]))
    return sorted(found - {os.getpid()})


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel hands to connections: it stays free until the ranks are up."""
    try:
        end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    except OSError:
        end = 32768
    choices = [*random.SystemRandom().sample(range(FIRST_PORT, end), 50)] if end - FIRST_PORT > 50 else []
    for port in [*choices, 0]:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise Refused(
        "No free port was found for the ranks to meet on.",
        where="this host",
        remedy="End what listens, or widen net.ipv4.ip_local_port_range.",
    )
