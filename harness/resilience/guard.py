"""A rank's own watch: it ends when what is above it is gone, and shows its stacks when it is asked."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from pathlib import Path

from harness import above
from harness.errors import EXIT_RESUME_ME
from harness.log import say
from harness.resilience.signals import StopFlag

LEASH_S = 60.0
"""Seconds between the end of what is above a rank and its own; in them it stops as if it had been asked to."""
_LOOK_S = 1.0


def show_stacks_on_request(path: Path) -> None:
    """From now on SIGUSR2 writes the stacks of all threads to `path`: in C, so that it works while Python waits."""
    stream = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the process lives)
    faulthandler.register(signal.SIGUSR2, file=stream, all_threads=True)


class Guard:
    """Watches the launchers above this rank.

    Args:
        stop: set when one of them is gone, unless it is already.
        leash_s: seconds until this process is ended in any case.
    """

    def __init__(self, stop: StopFlag, *, leash_s: float = LEASH_S):
        self.stop, self.leash_s, self.above = stop, leash_s, above.launchers()

    def start(self) -> None:
        """Begin to watch, if there is anything above."""
        if self.above:
            threading.Thread(target=self._watch, name="harness-guard", daemon=True).start()

    def _watch(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2})
        while not (gone := [ancestor for ancestor in self.above if ancestor.is_gone]):
            time.sleep(_LOOK_S)
        found = f"{gone[0].name} (process {gone[0].pid}), which started this rank, is gone"
        self.stop.reason = self.stop.reason or found  # the kernel may have asked before, as a starter's death does
        say(f"{found}; stopping.")
        time.sleep(self.leash_s)
        os._exit(EXIT_RESUME_ME)
