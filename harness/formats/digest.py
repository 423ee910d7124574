"""The digest of data files: XXH3-128, which finds every accident at ten times the speed of a cryptographic hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

BLOCK_BYTES = 1 << 20


def start() -> Any:
    """A state to `update` with bytes; its `hexdigest` is the digest."""
    return xxhash.xxh3_128()


def of_bytes(content: bytes) -> str:
    """The digest of `content`, as hex."""
    return xxhash.xxh3_128_hexdigest(content)


def of_file(path: Path) -> str:
    """The digest of a file's bytes, as hex."""
    state = start()
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()
