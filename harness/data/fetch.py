"""How a file comes from behind a URL: retries, a watchdog for what stalls, size and digest on arrival, and no credentials in any message."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import parse_qsl, urlsplit

from harness.formats import digest
from harness.errors import Failure, HarnessError, Refused
from harness.log import say

T = TypeVar("T")
MOST_BACKOFF_S = 30.0
PIECE_BYTES = 8 << 20
HEED_S = 0.2
"""How often whoever waits looks whether it is still wanted."""
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub",
           "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs"}
_KEYS = r"x-(?:amz|goog)-[\w-]+|\w*(?:secret|password|passwd|token|credential|signature|access_?key|account_?key|api_?key)\w*|sig"
_REDACTIONS = [(re.compile(pattern, re.IGNORECASE), by) for pattern, by in (
    (r"(\b[a-z][\w+.-]*://)[^\s/'\"<>]*@", r"\1"),
    (r"(\b[a-z][\w+.-]*://[^\s?'\"<>]*)\?[^\s'\"<>]*", r"\1"),
    (r"\b(authorization)\b['\"]?\s*[=:].*", r"\1=***"),
    (rf"\b(?!\w*Error\b)({_KEYS})(?![\w-])['\"]?\s*[=:]\s*(?:'[^']*'|\"[^\"]*\"|[^\s&,;)<>]+)", r"\1=***"),
    (r"<(\w*(?:key|token|signature|secret)\w*)>[^<]*", r"<\1>***"),
    (r"\b(?:hf_[a-z0-9]{16,}|(?:AKIA|ASIA)[0-9A-Z]{16})\b", "***"),
)]


def never() -> bool:
    """Nothing is given up."""
    return False


def redact(text: str) -> str:
    """`text` without what could be a credential: user information and queries of URLs, and the values of telling keys."""
    for pattern, by in _REDACTIONS:
        text = pattern.sub(by, text)
    return text


class Gone(Failure):
    """The other side says that there is no such file."""


class Source:
    """The files behind a URL, each asked for again, with growing pauses, when something goes wrong.

    Args:
        url: of the set.
        folder: where its files are kept, for messages.
        attempts: how often a file is asked for.
        gone_attempts: the same, for an answer that will hardly change (not found, not allowed).
        backoff_s: the first pause, doubled every time.
        stall_s: how long nothing may arrive.

    Attributes:
        closed: ends what is under way.
        given_up: the same, as long as it says so.

    Raises:
        Refused: fsspec does not read such a URL, or its driver is not installed.
    """

    def __init__(self, url: str, *, folder: Path, attempts: int, gone_attempts: int, backoff_s: float, stall_s: float):
        self._url, self._shown, self._folder, self._scheme = url, redact(url), folder, url.partition("://")[0].lower()
        self._attempts, self._gone_attempts, self._backoff_s, self._stall_s = attempts, gone_attempts, backoff_s, stall_s
        self.closed, self.given_up = threading.Event(), never
        self._kind = self._find_kind()
        self.disconnect()

    def disconnect(self) -> None:
        """Connect anew when next asked, as a forked process must."""
        self._connected: Any = None

    def read(self, name: str) -> bytes:
        """All bytes of a small file.

        Raises:
            Gone: there is no such file.
            Failure: it could not be fetched.
        """
        return self._retry(name, lambda: self._wait(self._ask(name, None, None)))

    def fetch(self, name: str, part: Path, *, size: int, digest: str) -> None:
        """Fill `part`, which has its final size already, with a file of `size` bytes and this digest; errors as in `read`."""
        self._retry(name, lambda: self._download(name, part, size, digest))

    def failure(self, name: str, error: BaseException) -> Failure:
        """The message about a file that could not be had."""
        kind = Gone if self._is_gone(error) else Failure
        return kind(f"{name} of {self._shown} could not be fetched to {socket.gethostname()}: {self._cause(error)}.\n"
                    f"  remedy: Start the same command again; the cache is {self._folder.parent}; delete {self._folder / name} if it is damaged.")

    def pause(self, seconds: float) -> None:
        """Sleep; a Failure as soon as the source is closed, or what it fetches is given up."""
        deadline = time.monotonic() + seconds
        while not self.closed.wait(min(HEED_S, max(0.0, deadline - time.monotonic()))) and not self.given_up():
            if time.monotonic() >= deadline:
                return
        raise Failure(f"{self._shown} was closed while a file was being fetched.")

    def _retry(self, name: str, action: Callable[[], T]) -> T:
        num_final = 0
        for number in count(1):
            try:
                return action()
            except HarnessError:
                raise
            except Exception as error:
                num_final += (final := _is_final(error))
                limit = min(self._attempts, number - num_final + self._gone_attempts) if final else self._attempts
                if number >= limit:
                    raise self.failure(name, error) from None
                say(f"fetching {name} again: {self._cause(error)} (try {number + 1} of {limit})")
            if self._connected is not None:
                self._connected.invalidate_cache()
            self.pause(min(MOST_BACKOFF_S, self._backoff_s * 2 ** (number - 1)) * random.uniform(0.5, 1.5))
        raise AssertionError

    def _download(self, name: str, part: Path, size: int, digest: str) -> None:
        """One try: all bytes into `part`, and their digest is right."""
        with open(part, "r+b", buffering=0) as stream:
            arrival = _Arrival(stream, size)
            try:
                if self._scheme in ("http", "https"):
                    system = self._filesystem()
                    self._wait(asyncio.run_coroutine_threadsafe(system._get_file(self._path(name), arrival), system.loop), arrival)
                else:
                    for start in range(0, size, PIECE_BYTES):
                        stop = min(start + PIECE_BYTES, size)
                        arrival.write(self._wait(self._ask(name, start, stop + (stop == size))))  # one byte more would show a file that is too long
            finally:
                arrival.end()
        arrival.check(digest)

    def _ask(self, name: str, start: int | None, stop: int | None) -> concurrent.futures.Future[bytes]:
        system, path = self._filesystem(), self._path(name)
        if system.async_impl:
            return asyncio.run_coroutine_threadsafe(system._cat_file(path, start=start, end=stop), system.loop)
        future: concurrent.futures.Future[bytes] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()  # from here on `cancel` does nothing, and a late answer does no harm

        def answer() -> None:
            try:
                future.set_result(system.cat_file(path, start=start, end=stop))
            except BaseException as error:
                future.set_exception(error)

        with signals_blocked():
            threading.Thread(target=answer, name="harness-fetch", daemon=True).start()
        return future

    def _wait(self, future: concurrent.futures.Future[T], arrival: _Arrival | None = None) -> T:
        """The result, as long as something arrives."""
        started = time.monotonic()
        try:
            while not future.done():
                concurrent.futures.wait([future], timeout=min(0.2, self._stall_s / 4))
                self.pause(0)
                if not future.done() and time.monotonic() - max(started, arrival.moved if arrival else 0.0) > self._stall_s:
                    raise TimeoutError(f"nothing arrived for {self._stall_s:g} s")
            return future.result()
        finally:
            future.cancel()

    def _is_gone(self, error: BaseException) -> bool:
        return isinstance(error, FileNotFoundError) and not str(error.filename or "").startswith(str(self._folder.parent))

    def _cause(self, error: BaseException) -> str:
        if self._is_gone(error):
            return "there is no such file"
        text, parts = " ".join(str(error)[:4000].split()), urlsplit(self._url)
        for secret in (parts.password, parts.username, *(value for _, value in parse_qsl(parts.query))):
            text = text.replace(secret, "***") if secret and len(secret) > 3 else text
        return redact(f"{type(error).__name__}: {text}" if text and type(error) is not OSError else text or type(error).__name__)[:400].rstrip(".")

    def _path(self, name: str) -> str:
        """What the file system calls a file; a query, such as a signature, stays behind the name."""
        base, mark, query = self._url.partition("?") if self._scheme in ("http", "https") else (self._url, "", "")
        return str(self._filesystem()._strip_protocol(f"{base.rstrip('/')}/{name}{mark}{query}"))

    def _filesystem(self) -> Any:
        """The file system behind the URL, with options from the environment alone."""
        if self._connected is None:
            with signals_blocked():
                self._connected = self._kind(**self._options())
            if self._shown != self._url:  # fsspec's debug messages show URLs as they are
                logging.getLogger("fsspec.http").setLevel(logging.INFO)
        return self._connected

    def _find_kind(self) -> Any:
        import fsspec

        try:
            return fsspec.get_filesystem_class(self._scheme)
        except ImportError:
            raise Refused(f"{self._shown} needs a package that is not installed.",
                          remedy=f"pip install {DRIVERS.get(self._scheme, f'the fsspec driver for {self._scheme}')}") from None
        except ValueError as error:
            raise Refused(f"{self._shown} cannot be opened: {self._cause(error)}.", remedy="Give a folder, or a URL that fsspec reads.") from None

    def _options(self) -> dict[str, Any]:
        """What the URL itself says, and over HTTP no limit on the whole time that a download takes."""
        if self._scheme not in ("http", "https"):
            return self._kind._get_kwargs_from_urls(self._url)
        import aiohttp
        from fsspec.config import conf

        return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None), **conf.get(self._scheme, {}).get("client_kwargs", {})}}


class _Arrival:
    """What arrives, written where room is reserved for it and digested on the way; looks like a file to fsspec."""

    def __init__(self, stream: BinaryIO, size: int):
        self.stream, self.size, self.received, self.moved = stream, size, 0, time.monotonic()
        self._state, self._mutex, self._ended = digest.start(), threading.Lock(), False

    def write(self, block: bytes) -> int:
        """Append a block; a body that is too long is refused before it takes any room."""
        with self._mutex:
            if self._ended:
                raise OSError("the transfer was given up")
            if self.received + len(block) > self.size:
                raise OSError(f"more than the {self.size} bytes that the index says arrived")
            rest = memoryview(block)
            while rest:
                rest = rest[self.stream.write(rest):]
            self._state.update(block)
            self.received, self.moved = self.received + len(block), time.monotonic()
            return len(block)

    def end(self) -> None:
        """Let nothing more be written, however late it comes."""
        with self._mutex:
            self._ended = True

    def check(self, digest: str) -> None:
        """Raise OSError unless these are the bytes that were wanted."""
        if self.received != self.size:
            raise OSError(f"{self.received} of {self.size} bytes arrived")
        if self._state.hexdigest() != digest:
            raise OSError(f"the bytes are not those that were prepared (digest {self._state.hexdigest()}, the index says {digest})")

    def tell(self) -> int:
        """Bytes so far."""
        return self.received

    def read(self, *_: Any) -> bytes:
        """Not for reading."""
        raise OSError("not readable")

    close = end


def _is_final(error: BaseException) -> bool:
    """Whether the other side has answered, and asking again will hardly help."""
    if isinstance(error, FileNotFoundError | PermissionError) or "Credentials" in type(error).__name__:  # as botocore calls them
        return True
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Threads that start here leave the signals that stop a run to the main thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
