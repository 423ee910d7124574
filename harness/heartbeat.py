"""Where every rank of a host is: a few bytes of shared memory, which ranks mark and their node starter reads."""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

PHASES = ("start", "meet", "build", "load", "data", "forward", "backward", "reduce", "step", "save", "evaluate", "generate", "end")
VARIABLE = "HARNESS_HEARTBEAT"
_NAME = "harness-heartbeat"
_SLOT = struct.Struct(f"<dqqqdq{len(PHASES)}d")
_SLOT_BYTES = -(-_SLOT.size // 64) * 64


@dataclass(frozen=True)
class Beat:
    """The last mark of a rank.

    Attributes:
        at_s: when it was made, on the host's monotonic clock; before the first, when the board was made.
        step: optimizer step that the rank is in; 0 before the first.
        phase: one of PHASES.
        count: marks so far.
        began: when the rank was started, in seconds since the epoch; 0 before its first mark.
        spent_s: seconds in each phase up to this mark; phases that did not occur are left out.
        first: the step that the rank began with; 0 before it.
    """

    at_s: float
    step: int
    phase: str
    count: int
    began: float = 0.0
    spent_s: dict[str, float] = field(default_factory=dict)
    first: int = 0


class Board:
    """Marks of all ranks of a host: a file in memory without a name, which is gone when the last process that holds it is.

    Args:
        ranks: on this host.
    """

    def __init__(self, ranks: int):
        self.descriptor = os.memfd_create(_NAME, 0)
        os.ftruncate(self.descriptor, ranks * _SLOT_BYTES)
        self._memory = mmap.mmap(self.descriptor, ranks * _SLOT_BYTES)
        for local_rank in range(ranks):  # silence is counted from here, not from the host's start
            _SLOT.pack_into(self._memory, local_rank * _SLOT_BYTES, time.monotonic(), 0, 0, 0, 0.0, 0, *[0.0] * len(PHASES))

    def variable(self, local_rank: int) -> dict[str, str]:
        """What a rank, which must inherit the descriptor, finds in its environment."""
        return {VARIABLE: f"{self.descriptor}:{local_rank}"}

    def beat(self, local_rank: int) -> Beat:
        """The last mark of a rank."""
        at_s, step, phase, count, began_at, first, *spent_s = _SLOT.unpack_from(self._memory, local_rank * _SLOT_BYTES)
        return Beat(at_s, step, PHASES[phase], count, began_at, _rounded(dict(zip(PHASES, spent_s, strict=True))), first)

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.close()
        os.close(self.descriptor)


class Pulse:
    """The marks of this process; where no starter listens they only keep time.

    Attributes:
        began: when this process was started, in seconds since the epoch.
        spent_s: seconds in each phase so far, that which is going on left out; they add up to the life of the process.
    """

    def __init__(self) -> None:
        self.spent_s = dict.fromkeys(PHASES, 0.0)
        self._slot = _inherited()
        self._phase, self._step, self._count, self._first = 0, 0, 0, 0
        self._since_s = time.monotonic() - _age_s()
        self.began = time.time() - _age_s()
        self._write(time.monotonic())

    def mark(self, phase: str, step: int | None = None) -> None:
        """Say that `phase` of `step` begins now, or goes on."""
        now_s = time.monotonic()
        self.spent_s[PHASES[self._phase]] += now_s - self._since_s
        self._phase, self._since_s, self._count = PHASES.index(phase), now_s, self._count + 1
        self._step = self._step if step is None else step
        self._first = self._first or self._step
        self._write(now_s)

    def _write(self, now_s: float) -> None:
        if self._slot is not None:
            self._slot(now_s, self._step, self._phase, self._count, self.began, self._first, *self.spent_s.values())


def _inherited() -> Callable[..., None] | None:
    """Writes into this rank's slot; taken out of the environment, so that no child of the rank marks in its place."""
    descriptor, _, local_rank = os.environ.pop(VARIABLE, "").partition(":")
    try:
        if _NAME not in os.readlink(f"/proc/self/fd/{descriptor}"):
            return None
        memory = mmap.mmap(int(descriptor), 0)
    except (OSError, ValueError):
        return None
    offset = int(local_rank) * _SLOT_BYTES
    return lambda *values: _SLOT.pack_into(memory, offset, *values)


def _age_s() -> float:
    """Seconds since this process began, as the kernel counts them."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as stream:
            ticks = int(stream.read().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return 0.0


_PULSE = Pulse()
mark = _PULSE.mark


def alive() -> None:
    """A sign of life in the midst of long work: the phase that is going on goes on."""
    mark(PHASES[_PULSE._phase])


def began() -> float:
    """When this process was started, in seconds since the epoch."""
    return _PULSE.began


def spent() -> dict[str, float]:
    """Seconds of each phase of this process up to its last mark, rounded; phases that did not occur are left out."""
    return _rounded(_PULSE.spent_s)


def standing() -> float:
    """Seconds since the last mark of this process: the phase that is going on, which `spent()` leaves out."""
    return round(time.monotonic() - _PULSE._since_s, 3)


def _rounded(spent_s: dict[str, float]) -> dict[str, float]:
    return {phase: round(seconds, 3) for phase, seconds in spent_s.items() if seconds}
