"""Where the files of a prepared shard set come from: what every such place can do, and a folder, where nothing is copied."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from harness.data.cache import size_of
from harness.errors import Failure


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
            return (self.folder / safe(name)).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def hold(self, wanted: Wanted) -> Path:
        """The path of a file that is there at its full size."""
        path = self.folder / safe(wanted.name)
        size = size_of(path)
        if size != wanted.size:
            found = "is not there" if size is None else f"has {size} bytes instead of {wanted.size}"
            raise Failure(f"{wanted.name} of {self.url} {found} on {socket.gethostname()}.\n  remedy: Prepare the set again, or copy it again.")
        return path

    def release(self, name: str) -> None:
        """Nothing to do."""


def safe(name: str) -> str:
    """A name from an index must stay inside the set."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or str(path) != name or any(part.startswith(".") for part in path.parts):
        raise Failure(f"{name!r} is no name of a file of a shard set.")
    return name
