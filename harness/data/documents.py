"""The documents of a shard: tokenised segments joined to them, and the files that they are kept in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash


@dataclass
class Pending:
    """Documents that are not tokenised yet.

    Attributes:
        texts: the segments of all of them.
        trained: whether each segment is.
        segments: how many each document has.
        records: which record of the shard each document was, or began with.
        open: the numbers of the trained segments that no end-of-text token closes; what is trained goes on with the next one of the document.
    """

    texts: list[str] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    open: list[int] = field(default_factory=list)

    def records_of(self, segments: np.ndarray) -> list[int]:
        """The records whose documents hold some segments, each once."""
        documents = np.searchsorted(np.cumsum(self.segments), segments, side="right")
        return [self.records[number] for number in np.unique(documents).tolist()]

    def before(self) -> list[str]:
        """The segment before each one in its document; empty before the first."""
        before, first = ["", *self.texts][:-1], 0
        for count in self.segments:
            before[first] = ""
            first += count
        return before


@dataclass(frozen=True)
class Documents:
    """The token ids of many documents.

    Attributes:
        flat: uint16 or int32 [tokens]: one document after the other.
        lengths: int32 [documents].
        spans: int32 [spans, 3]: document, start and stop of what is trained.
        records: uint32 [documents]: which record of the shard each was.
        identities: uint64 [documents]: hash of the tokens of each.
    """

    flat: np.ndarray
    lengths: np.ndarray
    spans: np.ndarray
    records: np.ndarray
    identities: np.ndarray

    @classmethod
    def assemble(cls, ids: np.ndarray, offsets: np.ndarray, texts: Pending, *, start: Sequence[int], ends: Sequence[int], wide: bool) -> tuple[Documents, int]:
        """Join tokenised segments to documents; each trained one is closed by the end-of-text token unless it already ends or is left open.

        Args:
            ids: uint32 [tokens] of all segments.
            offsets: int64 [segments + 1]: where each begins.
            texts: what was tokenised.
            start: tokens before every document.
            ends: tokens that end an answer, the end of text first.
            wide: int32 instead of uint16.

        Returns:
            (documents, how many were left out for want of a trained token).
        """
        trained, sizes = np.asarray(texts.trained, bool), np.diff(offsets)
        owner = np.repeat(np.arange(len(texts.segments)), texts.segments)
        ended = np.zeros(len(sizes), bool)
        for back in (1, 2):
            there = sizes >= back
            last = ids[offsets[1:][there] - back]
            for token in ends:
                ended[there] |= last == token
        is_open = np.zeros(len(sizes), bool)
        is_open[texts.open] = True
        closed = trained & ~ended & ~is_open
        opens = np.zeros(len(sizes), np.int64)
        opens[np.flatnonzero(np.diff(owner, prepend=-1))] = len(start)
        room = opens + sizes + closed
        stops = np.cumsum(room)
        begins = stops - room + opens
        flat = np.empty(int(stops[-1]) if len(stops) else 0, np.int32 if wide else np.uint16)
        given = np.ones(len(flat), bool)
        given[stops[closed] - 1], flat[stops[closed] - 1] = False, ends[0]
        for place, token in enumerate(start):
            opening = (begins - len(start) + place)[opens > 0]
            given[opening], flat[opening] = False, token
        flat[given] = ids
        lengths = np.bincount(owner, weights=room, minlength=len(texts.segments)).astype(np.int64)
        origin = np.cumsum(lengths) - lengths
        first = np.flatnonzero(~(np.append(False, is_open[:-1]) & (np.diff(owner, prepend=-1) == 0)))  # of what is trained in one
        last = np.append(first[1:], len(sizes))[: len(first)] - 1
        spanned = trained[first] & (offsets[last + 1] > offsets[first])
        spans = np.column_stack([owner[first], begins[first] - origin[owner[first]], stops[last] - origin[owner[first]]])[spanned]
        counted = spans[:, 2] > np.maximum(spans[:, 1], 1)
        kept = np.bincount(spans[counted, 0], minlength=len(texts.segments)) > 0
        lost = int((~kept).sum())
        if lost:
            flat, spans = flat[np.repeat(kept, lengths)], spans[kept[spans[:, 0]]]
            spans[:, 0] = (np.cumsum(kept) - 1)[spans[:, 0]]
        lengths = lengths[kept]
        return cls(flat, lengths.astype(np.int32), spans.astype(np.int32).reshape(-1, 3), np.asarray(texts.records, np.uint32)[kept], _hashes(flat, lengths)), lost

    @classmethod
    def join(cls, parts: list[Documents]) -> Documents:
        """The documents of all parts, of which there is at least one, in order."""
        first = np.cumsum([0, *(len(part.lengths) for part in parts)])
        spans = [part.spans + np.asarray([number, 0, 0], np.int32) for part, number in zip(parts, first[:-1], strict=True)]
        return cls(np.concatenate([part.flat for part in parts]), np.concatenate([part.lengths for part in parts]), np.concatenate(spans),
                   np.concatenate([part.records for part in parts]), np.concatenate([part.identities for part in parts]))


def _hashes(flat: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """uint64 [documents]: 64 bits that are equal for documents of the same tokens."""
    content, stops = memoryview(flat).cast("B"), (np.cumsum(lengths) * flat.itemsize).tolist()
    return np.fromiter((xxhash.xxh3_64_intdigest(content[start:stop]) for start, stop in pairwise([0, *stops])), np.uint64, len(lengths))


def write_arrow(path: Path, documents: Documents, *, wide: bool) -> None:
    import pyarrow as pa

    spans, count = documents.spans, len(documents.lengths)
    offsets = np.concatenate([[0], np.cumsum(documents.lengths, dtype=np.int64)]).astype(np.int32)
    span_offsets = np.concatenate([[0], np.cumsum(np.bincount(spans[:, 0], minlength=count))]).astype(np.int32)

    def listed(values: np.ndarray, kind: pa.DataType, at: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(_arrow(at, pa.int32()), _arrow(values, kind))

    batch = pa.RecordBatch.from_arrays(
        [listed(documents.flat, pa.int32() if wide else pa.uint16(), offsets), listed(spans[:, 1], pa.int32(), span_offsets),
         listed(spans[:, 2], pa.int32(), span_offsets)],
        names=["input_ids", "trained_starts", "trained_stops"],
    )
    with _aside(path) as aside, pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _arrow(values: np.ndarray, kind: Any) -> Any:
    """An Arrow array of the same memory; `pa.array` would import pandas."""
    import pyarrow as pa

    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def save_array(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    with _aside(path) as aside, open(aside, "wb") as stream:
        np.save(stream, array)


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A place of this process to write to, which then becomes `path`: a worker that outlives a killed parent for a moment disturbs nobody."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    yield aside
    aside.replace(path)
