"""What a case leaves behind: processes, and names in /dev/shm that no process has use for."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

SHM = Path("/dev/shm")
MOMENT_S = 3.0
"""How long the kernel and the first process of the machine may take to tidy up."""


@dataclass(frozen=True)
class Before:
    """What was there before a case."""

    children: frozenset[int]
    names: frozenset[str]

    @classmethod
    def now(cls) -> Before:
        """Look."""
        return cls(frozenset(_children()), frozenset(os.listdir(SHM)))

    def assert_nothing_new(self, folder: Path) -> None:
        """No child of this process, nor process that was told of `folder`, is left; no name in /dev/shm that nobody has mapped."""
        deadline = time.monotonic() + MOMENT_S
        while left := self._left(folder):
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.1)

    def _left(self, folder: Path) -> list[str]:
        """Other people's runs make and use names of their own meanwhile; what is used is nobody's leftover."""
        left = [f"child {pid}" for pid in _children() if pid not in self.children]
        told = [(one.pid, " ".join(one.info["cmdline"] or [])) for one in psutil.process_iter(["cmdline"])]
        left += [f"process {pid} {words}" for pid, words in told if str(folder) in words]
        names = {name for name in os.listdir(SHM) if name not in self.names and not name.startswith(".")}
        return left + sorted(names - _mapped() if names else [])


def _children() -> list[int]:
    """Children of this process and theirs, zombies included; the tests' own pools of ranks are not a run's."""
    return [one.pid for one in psutil.Process().children(recursive=True)]


def _mapped() -> set[str]:
    """Names in /dev/shm that a process works with."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/maps"):
        try:
            found |= {line.rpartition("/")[2] for line in path.read_text().splitlines() if "/dev/shm/" in line}
        except OSError:
            continue
    return found
