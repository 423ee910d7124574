"""The ranks of one host, started, signalled, watched and reaped as one."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from harness import above, shared_memory
from harness.errors import EXIT_DONE, EXIT_RESUME_ME
from harness.formats.outcome import Outcome, newest_attempt
from harness.heartbeat import Board
from harness.launch import stacks
from harness.launch.job import Node
from harness.launch.peers import Peers
from harness.launch.requests import listening
from harness.launch.verdict import End, Ended, Gone
from harness.log import say

POLL_S = 0.1
LOOK_S = 1.0
LINGER_S = 5.0
"""How long ranks may outlive one that ended badly: they find out by themselves and say so, or wait for it in vain."""
GRACE_S = 60.0
"""How long ranks may outlive one that ended well or on request; then they are asked, and after as long again killed."""
STRAYS_S = 2.0
"""How long what ranks leave behind may tidy up, such as the semaphores of a pool of processes."""
KILL_AFTER_REQUESTS = 3
HELD = "HARNESS_HELD"
"""Names a descriptor that every process of the job holds open: what reads its other end knows when all are gone."""
_SUBREAPER, _PARENT_DEATH = 36, 1  # PR_SET_CHILD_SUBREAPER and PR_SET_PDEATHSIG of prctl(2)


class Starter:
    """Starts the ranks of a host and stays until all are gone: first `run`, then `leave`. It reaps every child, so it needs a process of its own.

    Args:
        node: the host's part of the job.
        run_dir: folder of the run.
        command: of a rank; by default `harness train` with the words of the run.
    """

    def __init__(self, node: Node, run_dir: Path, command: Sequence[str] = ()):
        self.node, self.run_dir = node, run_dir
        self.command = [*(command or (sys.executable, "-u", "-m", "harness", "train")), *node.job.words]
        self.host = socket.gethostname()
        self.requests = 0
        self.ranks: dict[int, subprocess.Popen[bytes]] = {}
        self.first: End | None = None
        self.gone: Gone | None = None
        self._board = Board(node.ranks)
        self._peers = Peers(node, self.host)
        self._ended_at_s = 0.0
        self._asked_to_end = False
        self._above = above.launchers()

    def run(self) -> Ended:
        """Start, watch and reap; SIGTERM, SIGINT, SIGUSR1 and SIGHUP are passed to all ranks at once."""
        _prctl(_SUBREAPER, 1)
        with listening(self._pass_on):
            self._start()
            looked_s = time.monotonic()
            while self.ranks:
                self._reap()
                self._hear()
                if self.ranks and time.monotonic() - looked_s >= LOOK_S:
                    looked_s = time.monotonic()
                    self._look()
                self._hurry()
                time.sleep(POLL_S)
            self._end_strays()
        return Ended(self.requests > 0, self.first, self.gone)

    def leave(self, outcome: Outcome) -> None:
        """Tell what launched the job how it ended, and let go of the other hosts."""
        self._peers.close(outcome)
        self._board.close()

    def _start(self) -> None:
        descriptors = [self._board.descriptor, *_held()]
        for local_rank in range(self.node.ranks):
            variables = os.environ | self.node.variables(local_rank) | self._board.variable(local_rank)
            self.ranks[local_rank] = subprocess.Popen(
                self.command, env=variables, start_new_session=True, pass_fds=descriptors, preexec_fn=_end_with_parent
            )
        if self.requests:
            self._signal(signal.SIGTERM)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.requests += 1
        again = self.requests >= KILL_AFTER_REQUESTS
        self._signal(signal.SIGKILL if again else signal.SIGTERM if number == signal.SIGHUP else number)

    def _signal(self, number: int) -> None:
        for child in list(self.ranks.values()):
            with suppress(ProcessLookupError):
                os.kill(child.pid, number)

    def _reap(self) -> None:
        """Collect every process that has ended: ranks, and orphans that came to this one."""
        places = {child.pid: local_rank for local_rank, child in self.ranks.items()}
        while (ended := _ended_child()) is not None:
            pid, code = ended
            if pid in places:
                self._note(places[pid], code)

    def _note(self, local_rank: int, code: int) -> None:
        child = self.ranks.pop(local_rank)
        child.returncode = code
        if local_rank == 0:
            beat = self._board.beat(0)
            self.gone = Gone(beat, time.time(), time.monotonic() - beat.at_s)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGTERM)  # what a rank leaves behind works for nobody
        self._ended_at_s = self._ended_at_s or time.monotonic()
        if code != EXIT_DONE and self.first is None:
            self.first = End(self.node.first_rank + local_rank, code, self._board.beat(local_rank), self.host)
            self._peers.tell(self.first)
            if self.first.is_foreign and not self.requests:
                say(self.first.reason())

    def _look(self) -> None:
        """Find a launcher that is gone, and a rank that is silent."""
        if not self.requests and (gone := [one for one in self._above if one.is_gone]):
            say(f"{gone[0].name} (process {gone[0].pid}), which started this, is gone; stopping.")
            self._pass_on(signal.SIGTERM, None)
        running = {self.node.first_rank + place: child for place, child in self.ranks.items()}
        stopped = {rank for rank, child in running.items() if stacks.state(child.pid) in ("T", "t")}
        found = self._peers.look({rank: self._board.beat(rank - self.node.first_rank) for rank in running}, stopped)
        if found is not None and self.first is None:
            self._peers.tell(found)
            self._end_because(found)

    def _hear(self) -> None:
        """Find out that a rank of another host ended badly, and what was asked of the job from outside."""
        found = self._peers.heard()
        if found is not None and self.first is None:
            self._end_because(found)
        for number in self._peers.requests():
            self._pass_on(number, None)

    def _end_because(self, end: End) -> None:
        """Show where all ranks stand if one is silent, and end them: one that stands still hears nothing else."""
        self.first, self._ended_at_s = end, self._ended_at_s or time.monotonic()
        say(end.reason())
        if end.silent is None:
            return
        stacks.ask([child.pid for child in self.ranks.values()])
        child = self.ranks.get(end.rank - self.node.first_rank)
        if child is not None and (attempt := newest_attempt(self.run_dir)[1]) is not None:
            path = attempt / "logs" / f"stacks-{end.rank:05d}-kernel.txt"
            with suppress(OSError):
                path.write_text(f"{end.reason()}\n{stacks.of_kernel(child.pid)}\n", encoding="utf-8")
                say(f"Where the ranks stood: {path.parent}/stacks-*.txt")
        self._signal(signal.SIGKILL)

    def _hurry(self) -> None:
        """End ranks that outlive the first: after a moment for their last words, or after a save if all is well."""
        if not self.ranks or not self._ended_at_s:
            return
        waited_s, first = time.monotonic() - self._ended_at_s, self.first
        if first is None or first.code == EXIT_RESUME_ME:
            if waited_s > GRACE_S and not self._asked_to_end:
                self._asked_to_end = True
                self._signal(signal.SIGTERM)
            if waited_s > 2 * GRACE_S:
                self._signal(signal.SIGKILL)
        elif waited_s > LINGER_S or (first.rank == 0 and not first.is_foreign):
            self._signal(signal.SIGKILL)  # after rank 0 the others have nothing to say

    def _end_strays(self) -> None:
        """Children that ranks left have become ours."""
        deadline = time.monotonic() + STRAYS_S
        while _children() and time.monotonic() < deadline:
            self._reap()
            time.sleep(POLL_S)
        while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline + STRAYS_S:
            for stray in left:  # its own children become ours as it dies
                with suppress(psutil.Error):
                    stray.kill()
            self._reap()
            time.sleep(POLL_S)
        first = self.node.first_rank
        shared_memory.forget(master=self.node.job.master, port=self.node.job.port, ranks=range(first, first + self.node.ranks))


def _held() -> list[int]:
    """The descriptor that all processes of the job hold, where this process has inherited it and not its name alone."""
    number = os.environ.get(HELD, "")
    with suppress(OSError):
        if number.isdigit() and stat.S_ISFIFO(os.fstat(int(number)).st_mode):
            return [int(number)]
    return []


def _ended_child() -> tuple[int, int] | None:
    """A child that has ended, with its exit code, or minus the signal that killed it."""
    with suppress(ChildProcessError):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            return pid, os.waitstatus_to_exitcode(status)
    return None


def _children() -> list[int]:
    return [child.pid for child in psutil.Process().children()]


def _prctl(what: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(what, value, 0, 0, 0)


def _end_with_parent() -> None:
    """In a rank, before it begins: SIGTERM when the starter dies, however it dies."""
    _prctl(_PARENT_DEATH, signal.SIGTERM)
