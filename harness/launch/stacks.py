"""Where ranks stand: their own stacks where they can still write them, what the kernel knows where they cannot."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

WAIT_S = 1.0
_FACTS = ("wchan", "syscall", "stack")


def state(pid: int) -> str:
    """The kernel's letter for a process: R runs, S waits, D waits for a device, T stands still, Z is dead; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def ask(pids: Sequence[int]) -> None:
    """Have those ranks write their stacks that can; each does so into its own log folder."""
    asked = [pid for pid in pids if state(pid) not in ("", "T", "t", "Z") and _catches(pid, signal.SIGUSR2)]
    for pid in asked:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR2)
    if asked:
        time.sleep(WAIT_S)


def of_kernel(pid: int) -> str:
    """What the kernel says of each thread of a process: its state, where it waits and, to root, its stack in the kernel."""
    lines = []
    for thread in sorted(Path(f"/proc/{pid}/task").glob("*"), key=lambda path: int(path.name)):
        lines.append(f"thread {thread.name} ({_read(thread / 'comm')}), state {state(int(thread.name)) or '?'}")
        lines += [f"  {name}: {text}" for name in _FACTS if (text := _read(thread / name))]
    return "\n".join(lines)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip().replace("\n", "\n    ")
    except OSError:
        return ""


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; without one it would die of it."""
    for line in _read(Path(f"/proc/{pid}/status")).splitlines():
        name, _, mask = line.partition(":")
        if name.strip() == "SigCgt":
            return bool(int(mask, 16) >> (number - 1) & 1)
    return False
