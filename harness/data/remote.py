"""A prepared set behind a URL, read through a bounded cache that a host's processes share."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from urllib.parse import unquote, urlsplit

from harness import files
from harness.data.cache import Cache, aside, flock, size_of, stat_of
from harness.data.fetch import Gone, Source, redact, signals_blocked
from harness.data.store import LocalStore, Store, Wanted, safe
from harness.errors import Failure, Refused
from harness.formats import digest
from harness.log import say

ATTEMPTS, GONE_ATTEMPTS, BACKOFF_S, STALL_S, ROOM_S = 6, 2, 0.5, 120.0, 600.0


class RemoteStore(Store):
    """A set behind a URL; `cache_dir/<16 hex of the URL>/` has the files that are here.

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
        self.cache = Cache(self.cache_dir, cache_bytes)
        self.folder = self.cache_dir / files.digest_text(self.url)[:16]
        self._source = Source(url, folder=self.folder, attempts=attempts, gone_attempts=gone_attempts, backoff_s=backoff_s, stall_s=stall_s)
        self._verified: set[Wanted] = set()
        self._wanted: list[Wanted] = []
        self._forget()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.cache.ledger():
                self.cache.make_room(0, soon={}, ahead=False)
        except OSError as error:
            raise Refused(f"{self.cache_dir} cannot be written: {error.strerror}.", remedy="Name another folder for the cache.") from None
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: (store := this()) and store._forget())

    def _forget(self) -> None:
        """Start without holds, thread and connections: in a forked process they belong to the parent."""
        self.cache.forget()
        self._held: dict[str, list[int]] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._source.disconnect()

    def read_small(self, name: str) -> bytes | None:
        """The bytes of a file, asked for anew; None when the other side says that there is none."""
        try:
            return self._source.read(safe(name))
        except Gone:
            return None

    def hold(self, wanted: Wanted) -> Path:
        """The path of a file in the cache, verified, fetched if need be.

        Raises:
            Refused: the file is larger than the bound.
            Failure: it could not be fetched, or found no room in time.
        """
        path = self.folder / safe(wanted.name)
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
            self.cache.shut(lock)
        return path

    def release(self, name: str) -> None:
        """Take back one hold; after the last one the file may be evicted."""
        with self._changed:
            held = self._held[name]
            held[1] -= 1
            if not held[1]:
                self.cache.shut(self._held.pop(name)[0])
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
                self.cache.shut(lock)
            self._held = {}

    def _too_large(self, wanted: Wanted) -> bool:
        return self.cache_bytes is not None and wanted.size > self.cache_bytes

    def _acquire(self, wanted: Wanted, path: Path) -> int:
        """A shared lock on a sound file, waiting for other processes and for room."""
        seen, deadline = None, time.monotonic() + self.room_s
        for turn in count():
            obstacle, lock = "stopped", self.cache.open(aside(path, "lock"))
            try:
                obstacle = self._settle(lock, wanted, path)
            except OSError as error:
                raise self._source.failure(wanted.name, error) from None
            finally:
                if obstacle:
                    self.cache.shut(lock)
            if not obstacle:
                return lock
            part = stat_of(aside(path, "part"))
            if (stamp := part and part.st_mtime_ns) != seen:  # another process is getting on with it
                seen, deadline = stamp, time.monotonic() + self.room_s
            if time.monotonic() > deadline:
                raise Failure(f"{wanted.name} of {self.url} could not be had for {self.room_s:g} s on {socket.gethostname()}: {obstacle}.\n"
                              f"  remedy: Raise the bound of the cache {self.cache_dir} ({self.cache_bytes} bytes).")
            self._source.pause(min(0.5, 0.01 * 1.5**min(turn, 20)) * random.uniform(0.5, 1))
        raise AssertionError

    def _settle(self, lock: int, wanted: Wanted, path: Path) -> str:
        """Leave `lock` shared on a sound file; otherwise say what stands in the way."""
        if not (path.exists() and flock(lock, fcntl.LOCK_SH) and self._sound(wanted, path)):
            if not flock(lock, fcntl.LOCK_EX):
                return "it is being fetched elsewhere, or a damaged copy is in use"
            if not self._sound(wanted, path):
                if path.exists():
                    say(f"fetching {wanted.name} again: its copy in the cache is damaged")
                    path.unlink()
                if not self._fetch(wanted, path, ahead=False):
                    return f"all else in {self.cache_dir} is in use, and leaves no room for its {wanted.size} bytes"
            if not flock(lock, fcntl.LOCK_SH) or size_of(path) != wanted.size:
                return "it was evicted as soon as it was there"
        os.utime(path)
        return ""

    def _sound(self, wanted: Wanted, path: Path) -> bool:
        """Whether the file is here and whole: by its size always, by its digest once."""
        if size_of(path) != wanted.size:
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
        path = self.folder / safe(wanted.name)
        if size_of(path) == wanted.size or self._too_large(wanted):
            return True
        with self.cache.alone(aside(path, "lock")) as alone:
            if not alone or size_of(path) == wanted.size:
                return True
            path.unlink(missing_ok=True)
            return self._fetch(wanted, path, ahead=True)

    def _fetch(self, wanted: Wanted, path: Path, *, ahead: bool) -> bool:
        """Reserve the room and download, under the exclusive lock of the file; False when there is no room."""
        part = aside(path, "part")
        part.unlink(missing_ok=True)
        with self.cache.ledger():
            if not self.cache.make_room(wanted.size, soon=self._soon(), ahead=ahead):
                return False
            with open(part, "wb") as stream:
                stream.truncate(wanted.size)
        try:
            self._source.fetch(wanted.name, part, size=wanted.size, digest=wanted.digest)
            with self.cache.ledger():
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        self._verified.add(wanted)
        return True

    def _soon(self) -> dict[Path, int]:
        """Files that are wanted next, the nearest highest."""
        return {self.folder / wanted.name: -place for place, wanted in enumerate(self._wanted)}


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
