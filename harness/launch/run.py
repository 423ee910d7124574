"""A launch as a value, and its start: pass on what is asked, wait until every process of it is gone, and say how it ended."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from harness import files
from harness.errors import EXIT_DONE, EXIT_FAILURE, EXIT_RESUME_ME, AnomalyStop, CheckFailed, PeerLost, Refused
from harness.formats.outcome import Outcome, newest_attempt, read_outcome
from harness.launch.job import Job
from harness.launch.requests import listening
from harness.launch.starter import HELD, KILL_AFTER_REQUESTS
from harness.launch.wire import Wire
from harness.log import say

LEASH_S = 90.0
"""How long ranks may outlive what was started here and killed: they stop by themselves within a minute, after a save."""
LINGER_S = 20.0
"""How long the other hosts' parts may outlive one that failed, before they are ended."""
POLL_S, ALIVE_S = 0.1, 1.0
_STATES = {EXIT_DONE: "done", **{error.exit_code: error.state for error in (Refused, AnomalyStop, CheckFailed, PeerLost)}}
_KILLED = {128 + signal.SIGKILL, 128 + signal.SIGTERM}
"""What mpirun answers with after a rank was killed."""


@dataclass(frozen=True)
class LaunchPlan:
    """What is started, and where its outcome will be.

    Attributes:
        commands: each a process of this machine; more than one where each leads to a host.
        run_dir: of the run.
        environment: variables that they need, besides those of this process.
        job: where the node starters are reached, when signals to these processes would not reach them.
        request: the signal that stands for any request, where others would be understood otherwise.
        texts: files that must be there first.
        private: the same, which this user alone may read, and which are taken away at the end.
        stdin: what each command reads from its standard input.
    """

    commands: tuple[tuple[str, ...], ...]
    run_dir: Path
    environment: dict[str, str] = field(default_factory=dict)
    job: Job | None = None
    request: signal.Signals | None = None
    texts: dict[Path, str] = field(default_factory=dict)
    private: dict[Path, str] = field(default_factory=dict)
    stdin: str = ""


def run(plan: LaunchPlan) -> Outcome:
    """Start what is planned, pass on what is asked, wait until all its processes are gone, and say how it ended."""
    running, started = _Running(plan), time.time()
    try:
        for path, text in (plan.texts | plan.private).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(path, text, mode=0o600 if path in plan.private else 0o666)
        with running.listening():
            running.start()
            code = running.wait()
    finally:
        for path in plan.private:
            path.unlink(missing_ok=True)
    outcome = read_outcome(plan.run_dir)
    if outcome is not None and outcome.time >= started:
        return outcome
    outcome = running.told or _by_code(code, plan.run_dir, asked=running.asked > 0)
    say(outcome.reason)
    return outcome


def _by_code(code: int, run_dir: Path, *, asked: bool) -> Outcome:
    """How a run ended that left no outcome here, or none that this machine sees."""
    attempt, _ = newest_attempt(run_dir)
    told = f"What was started ended with code {code}; this machine finds no outcome of it in {run_dir}."
    if asked and code != EXIT_DONE:
        return Outcome("stopped", EXIT_RESUME_ME, f"Stopped on request. {told}", 0, attempt)
    code = EXIT_RESUME_ME if code in _KILLED else code
    return Outcome(_STATES.get(code, "failed"), code if code >= 0 else EXIT_FAILURE, told, 0, attempt)


class _Running:
    """The processes of one launch: in sessions of their own, so that no terminal signals them behind our back.

    All of them on this machine hold the writing end of a pipe open; when its reading end comes to its end, the last of them is
    gone, however it died.
    """

    def __init__(self, plan: LaunchPlan):
        self.plan, self.asked = plan, 0
        self.told: Outcome | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self._pipe, self._told_s = -1, 0.0
        self._wire = Wire.from_outside(plan.job) if plan.job is not None else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the requests, and let go of everything at the end."""
        try:
            with listening(self._pass_on):
                yield
        finally:
            os.close(self._pipe)
            if self._wire is not None:
                self._wire.close()

    def start(self) -> None:
        """Start the commands; a request that came before is carried out now."""
        self._pipe, held = os.pipe()
        environment = os.environ | self.plan.environment | {HELD: str(held)}
        try:
            for command in self.plan.commands:
                with self._stdin() as stdin:
                    child = subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=(held,), stdin=stdin)
                self._children.append(child)
        finally:
            os.close(held)
        if self.asked:
            self._send(signal.SIGTERM)

    @contextmanager
    def _stdin(self) -> Iterator[IO[bytes] | None]:
        """What a command reads, in a file without a name: nobody waits until it is read."""
        if not self.plan.stdin:
            yield None
            return
        with tempfile.TemporaryFile() as stream:
            stream.write(self.plan.stdin.encode())
            stream.seek(0)
            yield stream

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self.plan.request and self.asked >= KILL_AFTER_REQUESTS:  # else the starters count
            self._kill()
        else:
            self._send(number)

    def _kill(self) -> None:
        for child in self._children:
            with suppress(psutil.Error):
                for process in [*psutil.Process(child.pid).children(recursive=True), child]:
                    with suppress(psutil.Error):
                        process.kill()

    def _send(self, number: int) -> None:
        if self._wire is not None and self._wire.is_connected:
            self._wire.send({"kind": "request", "number": int(number)})
            return
        for child in self._children:  # a launcher between here and the ranks is spared its own ideas of a clean end
            child.send_signal(signal.SIGKILL if self._wire is not None else self.plan.request or number)

    def wait(self) -> int:
        """Until all are gone; the code of the first that failed, or 0."""
        code, failed_s = 0, 0.0
        while running := [child for child in self._children if child.poll() is None]:
            self._tell()
            ended = [child.returncode for child in self._children if child.returncode]
            if ended and not failed_s:
                code, failed_s = ended[0], time.monotonic()
            if failed_s and time.monotonic() - failed_s > LINGER_S:
                say("A part of the job has ended; ending the rest ...")
                self._send(signal.SIGTERM)
                for child in running:
                    child.terminate()
                failed_s = time.monotonic()
            time.sleep(POLL_S)
        self._wait_for_all()
        self._hear()
        return code or next((child.returncode for child in self._children if child.returncode), 0)

    def _tell(self) -> None:
        """On the wire: that this launch is alive."""
        if self._wire is not None and time.monotonic() - self._told_s > ALIVE_S:
            self._told_s = time.monotonic()
            self._hear()
            self._wire.send({"kind": "alive"})

    def _hear(self) -> None:
        """On the wire: how the job ended, as its first host knows it."""
        for _, message in self._wire.receive() if self._wire is not None else ():
            if message.get("kind") == "outcome":
                self.told = Outcome(**message["outcome"])

    def _wait_for_all(self) -> None:
        """Wait for processes that outlived what started them; in the end kill them."""
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
