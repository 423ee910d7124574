"""A stop request as a flag: handlers do nothing else, so that no save ever runs inside one."""

from __future__ import annotations

import math
import signal
import time
from types import FrameType

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
