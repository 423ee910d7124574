"""How tensors are written to a safetensors file without ever holding the whole file in memory.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of the header, little-endian; the
header, JSON padded with spaces to a multiple of eight; the tensors' bytes, one after another in the header's order.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        name: its key.
        dtype: key of `ITEM_BYTES`.
        shape: its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its length in the file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def encode_header(entries: list[TensorEntry]) -> bytes:
    """Everything that stands before the first tensor's bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.num_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, entries: list[TensorEntry], chunks: Iterable[Any]) -> tuple[int, str]:
    """Write a durable safetensors file.

    Args:
        path: the file, replaced when it exists.
        entries: the tensors, in order.
        chunks: their bytes (objects with the buffer protocol), in order, cut anywhere.

    Returns:
        the file's length in bytes and its digest, as `harness.files.digest_file` gives it.

    Raises:
        ValueError: when the chunks are not as long as the entries say.
    """
    header = encode_header(entries)
    state, written = hashlib.blake2b(digest_size=16), len(header)
    with open(path, "wb") as stream:
        stream.write(header)
        state.update(header)
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            stream.write(view)
            state.update(view)
            written += len(view)
        stream.flush()
        os.fsync(stream.fileno())
    expected = len(header) + sum(entry.num_bytes for entry in entries)
    if written != expected:
        raise ValueError(f"{path}: {written} bytes were written where the header promises {expected}")
    return written, state.hexdigest()
