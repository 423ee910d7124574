"""Files that are either whole or absent: atomic writes, digests, and folders that survive a crash."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

UNWRITABLE = frozenset({errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.ENOTDIR})
"""Errors of a place that cannot be written, or not any more."""


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (fsync of the directory itself)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Replace `path` by `content` in one step: write aside, fsync, rename; `mode` is cut by the umask."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def write_text(path: Path, content: str, *, mode: int = 0o666) -> None:
    """Replace `path` by UTF-8 text in one step."""
    write_bytes(path, content.encode("utf-8"), mode=mode)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by a readable JSON document in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON document in `path`."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def open_to_append(path: Path) -> TextIO:
    """Open a file of lines at its end; a line that a crash cut short is closed first, for it would swallow the next one."""
    with suppress(OSError), open(path, "rb") as stream:
        stream.seek(-1, os.SEEK_END)
        is_cut = stream.read(1) != b"\n"
        with suppress(OSError), open(path, "ab") as end:
            end.write(b"\n" * is_cut)
    return open(path, "a", encoding="utf-8")


def digest_file(path: Path, *, each: Callable[[], None] = lambda: None) -> str:
    """BLAKE2b-128 of a file's bytes, as hex; reads 4 MiB at a time, and calls `each` after each of them."""
    state = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as stream:
        while block := stream.read(4 << 20):
            state.update(block)
            each()
    return state.hexdigest()


def remembered_digests(paths: list[Path], known: Path, digest: Callable[[Path], str]) -> list[str]:
    """The digest of each path; those whose size and time of change are as `known` remembers them are not read again."""
    memory = read_json(known) if known.is_file() else {}
    found = {}
    for path in paths:
        state = path.stat()
        name, stamp = str(path.absolute()), [state.st_size, state.st_mtime_ns]
        found[name] = memory[name] if memory.get(name, [None])[0] == stamp else [stamp, digest(path)]
    if any(memory.get(name) != value for name, value in found.items()):
        try:
            known.parent.mkdir(parents=True, exist_ok=True)
            write_json(known, memory | found)
        except OSError:  # a read-only folder remembers nothing
            pass
    return [found[str(path.absolute())][1] for path in paths]


def digest_text(*parts: str) -> str:
    """BLAKE2b-128 of the parts, unambiguous about where one ends and the next begins."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        state.update(len(encoded).to_bytes(8, "little"))
        state.update(encoded)
    return state.hexdigest()
