"""A stop request as a flag: handlers do nothing else, so that no save ever runs inside one."""

from __future__ import annotations

import signal
from types import FrameType

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1 from the moment it is installed.

    Attributes:
        reason: name of the signal that asked first, or an empty string.
    """

    def __init__(self) -> None:
        self.reason = ""

    def install(self) -> None:
        """Take over the signals; call it on the main thread, after the ranks have met."""
        for number in REQUESTS:
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def __bool__(self) -> bool:
        return bool(self.reason)
