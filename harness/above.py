"""What is above this process: the launchers among its ancestors, and whether one of them is gone."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = {"deepspeed", "harness", "torchrun", "accelerate", "mpirun", "mpiexec", "prterun", "orterun", "orted", "prted", "hydra_pmi_proxy", "srun", "slurmstepd"}
MODULES = ("deepspeed.launcher", "harness", "torch.distributed", "accelerate.commands")


@dataclass(frozen=True)
class Ancestor:
    """A process above this one; its number may be used again, its start may not.

    Attributes:
        pid: its number.
        started: ticks of the kernel's clock.
        name: what it is called in messages.
    """

    pid: int
    started: str
    name: str

    @property
    def is_gone(self) -> bool:
        """Whether it has ended."""
        stat = _stat(self.pid)
        return stat is None or stat[19] != self.started or stat[0] == "Z"


def launchers() -> list[Ancestor]:
    """The launchers above this process, nearest first: without them nobody wants its work any more.

    A session of sshd counts where there is no terminal and a hangup is not ignored: it is then a launcher's way to this host.
    """
    found, pid = [], os.getppid()
    remote = _has_no_terminal() and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    while pid > 0 and (stat := _stat(pid)) is not None:
        if name := _launcher(pid, remote):
            found.append(Ancestor(pid, stat[19], name))
        pid = int(stat[1])
    return found


def _launcher(pid: int, remote: bool) -> str:
    """The name of a launcher, or nothing."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").strip("\0").split("\0")
    except OSError:
        return ""
    if remote and words[0].startswith("sshd"):
        return "sshd"
    for word in words[:2]:  # an interpreter may stand before a script
        if (name := os.path.basename(word)) in PROGRAMS:
            return name
    modules = [after for word, after in zip(words, words[1:], strict=False) if word == "-m"]
    return next((name for name in modules if name.startswith(MODULES)), "")


def _has_no_terminal() -> bool:
    stat = _stat(os.getpid())
    return stat is not None and stat[4] == "0"


def _stat(pid: int) -> list[str] | None:
    """State, parent and what else follows the name in /proc/PID/stat."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
