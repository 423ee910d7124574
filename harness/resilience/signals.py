"""A stop request as a flag: handlers do nothing else, so that no save ever runs inside one."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from harness import distributed
from harness.formats import ledger

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1 from the moment it is installed.

    Attributes:
        reason: name of the signal that asked first, or an empty string.
        since: when it came, by the monotonic clock.
    """

    def __init__(self) -> None:
        self.reason, self.since = "", math.inf

    def install(self) -> None:
        """Take over the signals; call it on the main thread, after the ranks have met."""
        for number in REQUESTS:
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        if not self.reason:
            self.reason, self.since = signal.Signals(number).name, time.monotonic()

    def left_s(self, grace_s: float | None) -> float:
        """Seconds that are left of the grace that a signal gives; infinity without a signal or a grace."""
        return math.inf if grace_s is None or not self.reason else self.since + grace_s - time.monotonic()

    def __bool__(self) -> bool:
        return bool(self.reason)


@dataclass(frozen=True)
class Requests:
    """What a run is asked: to stop, by a signal or by the file `control/stop`, to save, or to record a trace.

    Attributes:
        run_dir: of the run.
        stop: set by signals, and here once the file was seen.
    """

    run_dir: Path
    stop: StopFlag

    def taken(self, what: str) -> bool:
        """Whether rank 0 finds the file `control/WHAT`, which is taken away."""
        path = self.run_dir / "control" / what
        if distributed.rank() == 0 and path.exists():
            path.unlink(missing_ok=True)
            return True
        return False

    def asked(self) -> bool:
        """Whether this rank was asked to stop; once it was, it stays so."""
        if not self.stop and self.taken("stop"):
            self._stop_by_file()
        return bool(self.stop)

    def asked_of_all(self) -> bool:
        """The same, but every rank looks for the file: one that waits alone is not told by the others."""
        if not self.stop and (self.run_dir / "control" / "stop").exists():
            self._stop_by_file()
        return bool(self.stop)

    def _stop_by_file(self) -> None:
        """A stop by hand, unlike one by a signal, is none that a scheduler should go on after: the ledger says which it was."""
        self.stop.reason = "control/stop"
        if distributed.rank() == 0:
            ledger.append(self.run_dir, "asked", what="stop")
