"""Locks around compiled operators: ours, which dies with its holders, and torch's, which a killed build leaves behind."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

UNOWNED_S = (
    3.0  # a lock is stale when nobody was seen to own it for so long; torch itself holds it for less while it loads
)
_POLL_S = 0.2


@contextmanager
def exclusive(path: Path, *, notice: Callable[[], None]) -> Iterator[int]:
    """Hold an advisory lock on `path` and yield its descriptor.

    A child that inherits the descriptor holds the lock too: the kernel releases it when the last of them is gone, however they end.

    Args:
        path: lock file; it stays, its presence means nothing.
        notice: called once if another process holds the lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notice()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def owners(lock: Path) -> list[int]:
    """Processes on this host that hold torch's lock file open, or work in its folder as ninja and the compilers do."""
    lock = lock.resolve()
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(lock.parent) or any(opened.path == str(lock) for opened in process.open_files()):
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue  # gone, or another user's
    return found


def clear(lock: Path, *, notice: Callable[[list[int]], None], unowned_s: float | None = None) -> bool:
    """Wait until nobody holds torch's lock file, and remove it if it was left behind.

    Args:
        lock: `<operator's folder>/lock`.
        notice: called once with the owners' process ids if there are any.
        unowned_s: seconds without an owner after which the file counts as left behind; UNOWNED_S by default.

    Returns:
        True if the file was stale and is removed; then the operator beside it may be half written.
    """
    patience_s = UNOWNED_S if unowned_s is None else unowned_s
    told, unowned_since = False, None
    while lock.exists():
        if pids := owners(lock):
            unowned_since = None
            if not told:
                notice(pids)
                told = True
        elif unowned_since is None:
            unowned_since = time.monotonic()
        elif time.monotonic() - unowned_since >= patience_s:
            lock.unlink(missing_ok=True)
            return True
        time.sleep(_POLL_S)
    return False
