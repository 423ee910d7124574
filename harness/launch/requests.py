"""The signals by which a launch is asked to stop, taken over for as long as something listens."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@contextmanager
def listening(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Give every request to `handler`, and the signals back at the end; a hangup stays ignored where it was (nohup)."""
    before = {number: signal.getsignal(number) for number in REQUESTS}
    for number, old in before.items():
        if number != signal.SIGHUP or old != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
