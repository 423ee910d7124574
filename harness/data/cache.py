"""A folder that several processes fill together and that never takes more than its bound: its locks, and what is evicted."""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path


class Cache:
    """Files of remote sets on a local disk, a folder a set, named by 16 hex digits.

    Beside a file `x` stand `.x.lock`, locked by whoever holds (shared), fetches or evicts (exclusive) `x`, and `.x.part`, which has its final
    size from the start and so is its reservation. Sizes change only under the lock of the cache, so the sum keeps within the bound;
    the kernel drops the locks of a process that dies.

    Args:
        folder: of all sets.
        bound_bytes: the most that they may take together; None is no bound.
    """

    def __init__(self, folder: Path, bound_bytes: int | None):
        self.folder, self.bound_bytes = folder, bound_bytes
        self._locks: set[int] = set()

    def forget(self) -> None:
        """Drop the locks, which in a forked process are the parent's."""
        for lock in list(self._locks):
            self.shut(lock)

    def ledger(self) -> AbstractContextManager[bool]:
        """No other process or thread changes what the cache takes."""
        return self.alone(self.folder / ".lock", wait=True)

    @contextmanager
    def alone(self, lock: Path, *, wait: bool = False) -> Iterator[bool]:
        """Whether nobody else has this lock; if so, nobody takes it in here."""
        descriptor = self.open(lock)
        try:
            if wait:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield flock(descriptor, fcntl.LOCK_EX)
        finally:
            self.shut(descriptor)

    def open(self, lock: Path) -> int:
        """A descriptor to lock; all are known, so that a forked process can drop its copies."""
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        self._locks.add(descriptor)
        return descriptor

    def shut(self, lock: int) -> None:
        """Close a descriptor, and with it its lock."""
        self._locks.discard(lock)
        os.close(lock)

    def make_room(self, size: int, *, soon: dict[Path, int], ahead: bool) -> bool:
        """Evict what was used longest ago, and what is wanted next only for a file that is wanted now; all that is needed, or nothing.

        Args:
            size: bytes that are needed.
            soon: files that are wanted next, the nearest highest.
            ahead: the room is for one of those.
        """
        used, complete = self._survey()
        if self.bound_bytes is None:
            return True
        over, doomed = used + size - self.bound_bytes, []
        with ExitStack() as locks:
            for path in sorted(complete, key=lambda path: (path in soon, soon.get(path, complete[path].st_mtime_ns), path)):
                if over <= 0 or (ahead and path in soon):
                    break
                if locks.enter_context(self.alone(aside(path, "lock"))):
                    doomed.append(path)
                    over -= complete[path].st_size
            for path in doomed if over <= 0 else ():
                path.unlink(missing_ok=True)
        return over <= 0

    def _survey(self) -> tuple[int, dict[Path, os.stat_result]]:
        """Bytes of all sets in the cache, and its complete files; what dead processes left half done is removed."""
        used, complete = 0, dict[Path, os.stat_result]()
        folders = [folder for folder in self.folder.iterdir() if re.fullmatch("[0-9a-f]{16}", folder.name)]
        for path in (path for folder in folders for path in folder.rglob("*")):
            is_hidden = path.name.startswith(".")
            if is_hidden and path.suffix == ".part":
                with self.alone(path.with_suffix(".lock")) as alone:
                    if alone:
                        path.unlink(missing_ok=True)
            state = stat_of(path)
            if state and stat.S_ISREG(state.st_mode):
                used += state.st_size
                if not is_hidden:
                    complete[path] = state
        return used, complete


def aside(path: Path, kind: str) -> Path:
    """The file beside `path` that is its `lock` or its unfinished `part`."""
    return path.with_name(f".{path.name}.{kind}")


def flock(lock: int, kind: int) -> bool:
    """Lock or convert at once, or not at all; a conversion may lose the lock in between."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def stat_of(path: Path) -> os.stat_result | None:
    """What is known of a file; None when it is not there."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def size_of(path: Path) -> int | None:
    """Bytes of a file; None when it is not there."""
    state = stat_of(path)
    return state.st_size if state else None
