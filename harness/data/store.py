"""Where the files of a prepared shard set come from: a folder, or a remote place read through a bounded cache that a host's processes share."""

from __future__ import annotations

import fcntl
import os
import random
import re
import socket
import stat
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from harness import files
from harness.data.fetch import Gone, Source, redact, signals_blocked
from harness.formats import digest
from harness.errors import Failure, Refused
from harness.log import say

ATTEMPTS, GONE_ATTEMPTS, BACKOFF_S, STALL_S, ROOM_S = 6, 2, 0.5, 120.0, 600.0


@dataclass(frozen=True)
class Wanted:
    """A file of a set and what the index knows of it.

    Attributes:
        name: relative to the set.
        size: in bytes.
        digest: as `formats.digest` makes it.
    """

    name: str
    size: int
    digest: str


def open_store(url: str | Path, *, cache_dir: Path | None, cache_bytes: int | None) -> Store:
    """The store of the set at `url`.

    Args:
        url: a folder, `file://`, or any URL that fsspec reads.
        cache_dir: where the files of remote sets are kept; several sets and processes may share it.
        cache_bytes: the most that all remote sets in `cache_dir` may take; None is unbounded.

    Raises:
        Refused: a remote set without a folder to keep it in, a folder that cannot be written, a driver that is not installed.
    """
    text = str(url)
    if isinstance(url, Path) or "://" not in text:
        return LocalStore(Path(url))
    if text.startswith("file://"):
        return LocalStore(Path(unquote(urlsplit(text).path)))
    if cache_dir is None:
        raise Refused(f"{redact(text)} is remote, and there is no folder to keep its files in.",
                      remedy="Name a folder on a local disk for the cache.")
    return RemoteStore(text, cache_dir=Path(cache_dir), cache_bytes=cache_bytes)


class Store(ABC):
    """The files of one set.

    Attributes:
        url: for messages, without user information and query.
        is_remote: whether files have to be fetched.
    """

    url: str
    is_remote: bool

    @abstractmethod
    def read_small(self, name: str) -> bytes | None:
        """A whole small file such as the index; None where there is none."""

    @abstractmethod
    def hold(self, wanted: Wanted) -> Path:
        """The local path of a complete file, which stays until it is released as often as it was held."""

    @abstractmethod
    def release(self, name: str) -> None:
        """Take back one `hold`; memory maps of the file must be gone by then."""

    def prefetch(self, wanted: Sequence[Wanted]) -> None:
        """What will be needed next, nearest first, instead of what was named before; returns at once."""

    def heed(self, given_up: Callable[[], bool]) -> None:
        """Let a wait for a file end with a Failure when `given_up` says so."""

    def close(self) -> None:
        """Release everything and end the thread."""


class LocalStore(Store):
    """A set in a folder: nothing is copied, and sizes alone are checked."""

    is_remote = False

    def __init__(self, folder: Path):
        self.folder, self.url = folder, str(folder)

    def read_small(self, name: str) -> bytes | None:
        """The bytes of a file, or None."""
        try:
            return (self.folder / _safe(name)).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def hold(self, wanted: Wanted) -> Path:
        """The path of a file that is there at its full size."""
        path = self.folder / _safe(wanted.name)
        size = _size(path)
        if size != wanted.size:
            found = "is not there" if size is None else f"has {size} bytes instead of {wanted.size}"
            raise Failure(f"{wanted.name} of {self.url} {found} on {socket.gethostname()}.\n  remedy: Prepare the set again, or copy it again.")
        return path

    def release(self, name: str) -> None:
        """Nothing to do."""


class RemoteStore(Store):
    """A set behind a URL; `cache_dir/<16 hex of the URL>/` has the files that are here.

    Beside a file `x` stand `.x.lock`, locked by whoever holds (shared), fetches or evicts (exclusive) `x`, and `.x.part`, which has its final
    size from the start and so is its reservation. Sizes change only under the lock of `cache_dir`, so the sum keeps within the bound;
    the kernel drops the locks of a process that dies.

    Args:
        url: of the set.
        cache_dir: shared by sets and processes.
        cache_bytes: the bound of `cache_dir`, over all its sets; None is no bound.
        attempts: how often a file is asked for.
        gone_attempts: the same, for an answer that will hardly change (not found, not allowed).
        backoff_s: the first pause, doubled every time.
        stall_s: how long nothing may arrive.
        room_s: how long `hold` waits for room.
    """

    is_remote = True

    def __init__(self, url: str, *, cache_dir: Path, cache_bytes: int | None, attempts: int = ATTEMPTS, gone_attempts: int = GONE_ATTEMPTS,
                 backoff_s: float = BACKOFF_S, stall_s: float = STALL_S, room_s: float = ROOM_S):
        self.url, self.cache_dir, self.cache_bytes, self.room_s = redact(url), cache_dir.absolute(), cache_bytes, room_s
        self.folder = self.cache_dir / files.digest_text(self.url)[:16]
        self._source = Source(url, folder=self.folder, attempts=attempts, gone_attempts=gone_attempts, backoff_s=backoff_s, stall_s=stall_s)
        self._verified: set[Wanted] = set()
        self._wanted: list[Wanted] = []
        self._locks: set[int] = set()
        self._forget()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._ledger():
                self._make_room(0, ahead=False)
        except OSError as error:
            raise Refused(f"{self.cache_dir} cannot be written: {error.strerror}.", remedy="Name another folder for the cache.") from None
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: (store := this()) and store._forget())

    def _forget(self) -> None:
        """Start without holds, thread and connections: in a forked process they belong to the parent."""
        for lock in list(self._locks):
            self._shut(lock)
        self._held: dict[str, list[int]] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._source.disconnect()

    def read_small(self, name: str) -> bytes | None:
        """The bytes of a file, asked for anew; None when the other side says that there is none."""
        try:
            return self._source.read(_safe(name))
        except Gone:
            return None

    def hold(self, wanted: Wanted) -> Path:
        """The path of a file in the cache, verified, fetched if need be.

        Raises:
            Refused: the file is larger than the bound.
            Failure: it could not be fetched, or found no room in time.
        """
        path = self.folder / _safe(wanted.name)
        with self._changed:
            if held := self._held.get(wanted.name):
                held[1] += 1
                return path
        if self._too_large(wanted):
            raise Refused(f"{wanted.name} of {self.url} has {wanted.size} bytes, more than the bound of the cache, {self.cache_bytes}.",
                          where=str(self.cache_dir), remedy="Raise the bound of the cache.")
        lock = self._acquire(wanted, path)
        with self._changed:
            held = self._held.setdefault(wanted.name, [lock, 0])
            held[1] += 1
        if held[0] != lock:  # another thread was faster
            self._shut(lock)
        return path

    def release(self, name: str) -> None:
        """Take back one hold; after the last one the file may be evicted."""
        with self._changed:
            held = self._held[name]
            held[1] -= 1
            if not held[1]:
                self._shut(self._held.pop(name)[0])
            self._changed.notify_all()

    def prefetch(self, wanted: Sequence[Wanted]) -> None:
        """Fetch these in the background, in order, while there is room; a failure shows when the file is held."""
        with self._changed:
            self._wanted = list(wanted)
            self._changed.notify_all()
            if self._thread is None and wanted and not self._source.closed.is_set():
                self._thread = threading.Thread(target=self._fetch_ahead, name="harness-prefetch", daemon=True)
                with signals_blocked():
                    self._thread.start()

    def heed(self, given_up: Callable[[], bool]) -> None:
        """Let a wait for a file end with a Failure when `given_up` says so."""
        self._source.given_up = given_up

    def close(self) -> None:
        """End the thread and whatever is under way, and release everything."""
        self._source.closed.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=5)
        with self._changed:
            for lock, _ in self._held.values():
                self._shut(lock)
            self._held = {}

    def _too_large(self, wanted: Wanted) -> bool:
        return self.cache_bytes is not None and wanted.size > self.cache_bytes

    def _acquire(self, wanted: Wanted, path: Path) -> int:
        """A shared lock on a sound file, waiting for other processes and for room."""
        seen, deadline = None, time.monotonic() + self.room_s
        for turn in count():
            obstacle, lock = "stopped", self._open(_aside(path, "lock"))
            try:
                obstacle = self._settle(lock, wanted, path)
            except OSError as error:
                raise self._source.failure(wanted.name, error) from None
            finally:
                if obstacle:
                    self._shut(lock)
            if not obstacle:
                return lock
            part = _stat(_aside(path, "part"))
            if (stamp := part and part.st_mtime_ns) != seen:  # another process is getting on with it
                seen, deadline = stamp, time.monotonic() + self.room_s
            if time.monotonic() > deadline:
                raise Failure(f"{wanted.name} of {self.url} could not be had for {self.room_s:g} s on {socket.gethostname()}: {obstacle}.\n"
                              f"  remedy: Raise the bound of the cache {self.cache_dir} ({self.cache_bytes} bytes).")
            self._source.pause(min(0.5, 0.01 * 1.5**min(turn, 20)) * random.uniform(0.5, 1))
        raise AssertionError

    def _settle(self, lock: int, wanted: Wanted, path: Path) -> str:
        """Leave `lock` shared on a sound file; otherwise say what stands in the way."""
        if not (path.exists() and _flock(lock, fcntl.LOCK_SH) and self._sound(wanted, path)):
            if not _flock(lock, fcntl.LOCK_EX):
                return "it is being fetched elsewhere, or a damaged copy is in use"
            if not self._sound(wanted, path):
                if path.exists():
                    say(f"fetching {wanted.name} again: its copy in the cache is damaged")
                    path.unlink()
                if not self._fetch(wanted, path, ahead=False):
                    return f"all else in {self.cache_dir} is in use, and leaves no room for its {wanted.size} bytes"
            if not _flock(lock, fcntl.LOCK_SH) or _size(path) != wanted.size:
                return "it was evicted as soon as it was there"
        os.utime(path)
        return ""

    def _sound(self, wanted: Wanted, path: Path) -> bool:
        """Whether the file is here and whole: by its size always, by its digest once."""
        if _size(path) != wanted.size:
            return False
        if wanted not in self._verified and digest.of_file(path) == wanted.digest:
            self._verified.add(wanted)
        return wanted in self._verified

    def _fetch_ahead(self) -> None:
        closed, turn, missed = self._source.closed, self._wanted, set[Wanted]()
        while not closed.is_set():
            room = True
            for wanted in turn:
                try:
                    room = wanted in missed or self._fetch_one(wanted)
                except Exception:  # it is told when the file is held
                    missed.add(wanted)
                if not room or self._wanted is not turn or closed.is_set():
                    break
            with self._changed:
                if self._wanted is turn and not closed.is_set():
                    self._changed.wait(None if room else 1)
                if self._wanted is not turn:
                    turn, missed = self._wanted, set()

    def _fetch_one(self, wanted: Wanted) -> bool:
        """Whether there was room; a file that another one is busy with is left to it."""
        path = self.folder / _safe(wanted.name)
        if _size(path) == wanted.size or self._too_large(wanted):
            return True
        with self._alone(_aside(path, "lock")) as alone:
            if not alone or _size(path) == wanted.size:
                return True
            path.unlink(missing_ok=True)
            return self._fetch(wanted, path, ahead=True)

    def _fetch(self, wanted: Wanted, path: Path, *, ahead: bool) -> bool:
        """Reserve the room and download, under the exclusive lock of the file; False when there is no room."""
        part = _aside(path, "part")
        part.unlink(missing_ok=True)
        with self._ledger():
            if not self._make_room(wanted.size, ahead=ahead):
                return False
            with open(part, "wb") as stream:
                stream.truncate(wanted.size)
        try:
            self._source.fetch(wanted.name, part, size=wanted.size, digest=wanted.digest)
            with self._ledger():
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        self._verified.add(wanted)
        return True

    def _ledger(self) -> AbstractContextManager[bool]:
        """No other process or thread changes what `cache_dir` takes."""
        return self._alone(self.cache_dir / ".lock", wait=True)

    @contextmanager
    def _alone(self, lock: Path, *, wait: bool = False) -> Iterator[bool]:
        """Whether nobody else has this lock; if so, nobody takes it in here."""
        descriptor = self._open(lock)
        try:
            if wait:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield _flock(descriptor, fcntl.LOCK_EX)
        finally:
            self._shut(descriptor)

    def _open(self, lock: Path) -> int:
        """A descriptor to lock; all are known, so that a forked process can drop its copies."""
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        self._locks.add(descriptor)
        return descriptor

    def _shut(self, lock: int) -> None:
        self._locks.discard(lock)
        os.close(lock)

    def _make_room(self, size: int, *, ahead: bool) -> bool:
        """Evict what was used longest ago, and what is wanted next only for a file that is wanted now; all that is needed, or nothing."""
        used, complete = self._survey()
        if self.cache_bytes is None:
            return True
        over, doomed = used + size - self.cache_bytes, []
        soon = {self.folder / wanted.name: -place for place, wanted in enumerate(self._wanted)}
        with ExitStack() as locks:
            for path in sorted(complete, key=lambda path: (path in soon, soon.get(path, complete[path].st_mtime_ns), path)):
                if over <= 0 or (ahead and path in soon):
                    break
                if locks.enter_context(self._alone(_aside(path, "lock"))):
                    doomed.append(path)
                    over -= complete[path].st_size
            for path in doomed if over <= 0 else ():
                path.unlink(missing_ok=True)
        return over <= 0

    def _survey(self) -> tuple[int, dict[Path, os.stat_result]]:
        """Bytes of all sets in the cache, and its complete files; what dead processes left half done is removed."""
        used, complete = 0, dict[Path, os.stat_result]()
        folders = [folder for folder in self.cache_dir.iterdir() if re.fullmatch("[0-9a-f]{16}", folder.name)]
        for path in (path for folder in folders for path in folder.rglob("*")):
            is_hidden = path.name.startswith(".")
            if is_hidden and path.suffix == ".part":
                with self._alone(path.with_suffix(".lock")) as alone:
                    if alone:
                        path.unlink(missing_ok=True)
            state = _stat(path)
            if state and stat.S_ISREG(state.st_mode):
                used += state.st_size
                if not is_hidden:
                    complete[path] = state
        return used, complete


def _safe(name: str) -> str:
    """A name from an index must stay inside the set."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or str(path) != name or any(part.startswith(".") for part in path.parts):
        raise Failure(f"{name!r} is no name of a file of a shard set.")
    return name


def _aside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def _flock(lock: int, kind: int) -> bool:
    """Lock or convert at once, or not at all; a conversion may lose the lock in between."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _size(path: Path) -> int | None:
    state = _stat(path)
    return state.st_size if state else None
