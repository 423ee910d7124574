"""One shard: the records of its ranges, given to a side, tokenised, and written as Arrow files with their arrays."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from harness import collector, files
from harness.config.schema import Data
from harness.data import records
from harness.data.backends import open_backend
from harness.data.examples import key_of, reader
from harness.data.packing import Packing, write_plan
from harness.data.ranges import InputRange
from harness.data.records import Broken
from harness.data.template import Template
from harness.errors import Refused
from harness.formats import digest
from harness.formats.index import ShardEntry, ShardFile, ShardSource

EMPTY = "a part is empty or missing"
KNOWN = "its question is in the training set"
UNREADABLE = "cannot be read"
BATCH_CHARACTERS = 4 << 20
"""So much text is tokenised at a time: little enough to be in the processor's cache still, and for its memory to be used again."""


@dataclass(frozen=True)
class SideJob:
    """What a shard gives to one set.

    Attributes:
        folder: of the set.
        fingerprint: of the set; a finished shard of the same fingerprint is kept.
    """

    folder: Path
    fingerprint: str

    def part(self, name: str) -> Path:
        """Where the shard's part of the index and audit is kept until the set is whole."""
        return self.folder / "parts" / f"{name}.json"


@dataclass(frozen=True)
class ShardJob:
    """What one process needs to make one shard of each set that its records belong to.

    Attributes:
        name: such as shard-00000.
        parts: ranges of records, in order.
        data: the section of the run file.
        seed: of the run, which decides what is held out.
        sides: train, validation, or both: then `data.validation_share` of the questions goes to validation.
        tokenizer: folder of the tokenizer.
        backend: that tokenises.
        template: how examples become text.
        start: tokens before every text.
        ends: tokens that end an answer, the end of text first.
        wide: int32 instead of uint16 tokens.
        watch: uint64 array of questions; those that are met are reported.
        exclude: uint64 array of questions whose rows are left out.
    """

    name: str
    parts: tuple[InputRange, ...]
    data: Data
    seed: int
    sides: dict[str, SideJob]
    tokenizer: Path
    backend: str
    template: Template
    start: list[int]
    ends: list[int]
    wide: bool
    watch: Path | None = None
    exclude: Path | None = None


@dataclass
class Pending:
    """Documents that are not tokenised yet.

    Attributes:
        texts: the segments of all of them.
        trained: whether each segment is.
        segments: how many each document has.
        records: which record of the shard each document was.
    """

    texts: list[str] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    records: list[int] = field(default_factory=list)


@dataclass
class Side:
    """What a shard gives to one set, and what was left out of it."""

    pending: Pending = field(default_factory=Pending)
    made: list[Documents] = field(default_factory=list)
    rows_in: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def make_shard(job: ShardJob) -> dict[str, dict[str, Any]]:
    """Write the shard's files, or find them finished; returns for each side its part of the index and audit.

    Raises:
        Refused: a record that cannot be read, where it may not be dropped.
        Differs: when the fast backend disagrees with `tokenizers`.
    """
    if (done := _finished(job)) is not None:
        return done
    with nullcontext() if job.template.chat else collector.off():  # chat templates leave cycles behind
        return _made(job)


def _made(job: ShardJob) -> dict[str, dict[str, Any]]:
    gathering, counts = _gather(job)
    results = {}
    for which, side in gathering.sides.items():
        documents, where = Documents.join(side.made), job.sides[which]
        entry = _write(where.folder, job, where.fingerprint, documents, counts)
        _save_array(where.part(job.name).with_suffix(".identities.npy"), np.sort(documents.identities))
        results[which] = {
            "fingerprint": where.fingerprint, "entry": entry.model_dump(), "rows_in": side.rows_in, "dropped": dict(side.dropped),
            "broken": gathering.broken if side is gathering.first else [], "met": sorted(gathering.met),
        }
    for which, result in results.items():
        files.write_json(job.sides[which].part(job.name), result)
    return results


def _finished(job: ShardJob) -> dict[str, dict[str, Any]] | None:
    found = {}
    for which, side in job.sides.items():
        part = side.part(job.name)
        done = files.read_json(part) if part.is_file() else None
        if done is None or done["fingerprint"] != side.fingerprint:
            return None
        for file in ShardEntry.model_validate(done["entry"]).files:
            path = side.folder / file.name
            if not path.is_file() or digest.of_file(path) != file.digest:
                return None
        found[which] = done
    return found


@lru_cache(maxsize=1)
def _chat_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def held_out(seed: int, share: float, key: int) -> bool:
    """Whether the share of the training source that is kept for validation holds the question `key`."""
    return xxhash.xxh3_64_intdigest(f"{seed}:{key}".encode()) < share * 2**64


class _Gathering:
    """The records of a job on their way to a side, and to tokens."""

    def __init__(self, job: ShardJob):
        self.job, self.sides, self.backend = job, {which: Side() for which in job.sides}, open_backend(job.tokenizer, job.backend)
        self.read, self.characters = reader(job.data), 0
        self.first, self.splits = next(iter(self.sides.values())), len(self.sides) > 1
        self.exclude = frozenset(np.load(job.exclude).tolist() if job.exclude else ())
        self.watched = frozenset(np.load(job.watch).tolist() if job.watch else ())
        self.met: set[int] = set()
        self.broken: list[str] = []
        self.tokenizer = _chat_tokenizer(job.tokenizer) if job.template.chat else None

    def add(self, record: Any, number: int) -> None:
        """Give a record to a side, or count why it is left out."""
        example = self.read(record)
        if example is None:
            self.leave_out(self.first, EMPTY)
            return
        key = key_of(example)
        side = self.sides["validation"] if self.splits and held_out(self.job.seed, self.job.data.validation_share, key) else self.first
        if key in self.watched:
            self.met.add(key)
        if key in self.exclude:
            self.leave_out(side, KNOWN)
            return
        try:
            segments = self.job.template.segments(example, self.tokenizer)
        except Exception:  # a chat template may refuse a conversation
            self.leave_out(side, "refused by the chat template")
            return
        side.rows_in += 1
        pending = side.pending
        for text, trained in segments:
            pending.texts.append(text)
            pending.trained.append(trained)
            self.characters += len(text)
        pending.segments.append(len(segments))
        pending.records.append(number)
        if self.characters >= BATCH_CHARACTERS:
            self.tokenise()

    def tokenise(self) -> None:
        """Make documents of what is pending."""
        job, begin = self.job, 0
        ids, offsets = self.backend.encode([text for side in self.sides.values() for text in side.pending.texts])
        for side in self.sides.values():
            own = offsets[begin : begin + len(side.pending.texts) + 1]
            begin += len(side.pending.texts)
            documents, lost = Documents.assemble(ids[own[0] : own[-1]], own - own[0], side.pending, start=job.start, ends=job.ends, wide=job.wide)
            side.made.append(documents)
            if lost:
                side.dropped["no trained token"] += lost
            side.pending = Pending()
        self.characters = 0

    def leave_out(self, side: Side, cause: str) -> None:
        """Count a row that is dropped."""
        side.rows_in += 1
        side.dropped[cause] += 1

    def unreadable(self, record: Broken, part: InputRange) -> None:
        """Refuse a record that cannot be read, or count it where the run file says so."""
        if self.job.data.broken_rows == "refuse":
            raise Refused(f"{part.shown} line {record.line} {record.reason}.", where=f"{part.shown}:{record.line} ({part.key}.path)",
                          remedy="Mend or remove the line, or set data.broken_rows=drop to count such rows instead.")
        self.broken.append(f"{part.shown}:{record.line} {record.reason}")
        self.leave_out(self.first, UNREADABLE)


def _gather(job: ShardJob) -> tuple[_Gathering, list[int]]:
    """The documents of each side, and how many records each range holds."""
    gathering, counts, number = _Gathering(job), [], 0
    for part in job.parts:
        before = number
        for record in records.read(part):
            if isinstance(record, Broken):
                gathering.unreadable(record, part)
            elif record is not None:
                gathering.add(record, number)
            number += 1
        counts.append(number - before)
    gathering.tokenise()
    return gathering, counts


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
        """Join tokenised segments to documents; each trained one is closed by the end-of-text token unless it already ends.

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
        closed = trained & ~ended
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
        spanned = trained & (sizes > 0)
        spans = np.column_stack([owner, begins - origin[owner], stops - origin[owner]])[spanned]
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


def _write(folder: Path, job: ShardJob, fingerprint: str, documents: Documents, counts: list[int]) -> ShardEntry:
    """The files of the shard: an Arrow file, and the arrays from which packing and provenance are computed without it."""
    path = folder / f"{job.name}.arrow"
    _write_arrow(path, documents, wide=job.wide)
    arrays = {"lengths": documents.lengths, "spans": documents.spans, "records": documents.records}
    for what, array in arrays.items():
        _save_array(folder / f"{job.name}.{what}.npy", array)
    write_plan(folder, job.name, documents.lengths, documents.spans, Packing.of(job.data), fingerprint=fingerprint)
    spans = documents.spans
    return ShardEntry(
        name=job.name, rows=len(documents.lengths), tokens=int(documents.lengths.sum(dtype=np.int64)),
        trained_tokens=int((spans[:, 2] - np.maximum(spans[:, 1], 1)).sum()),
        files=[ShardFile.of(folder / f"{job.name}.{suffix}") for suffix in ("arrow", *(f"{what}.npy" for what in arrays))],
        sources=[ShardSource(file=part.shown, rows=count) for part, count in zip(job.parts, counts, strict=True)],
    )


def _write_arrow(path: Path, documents: Documents, *, wide: bool) -> None:
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


def _save_array(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    with _aside(path) as aside, open(aside, "wb") as stream:
        np.save(stream, array)


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A place of this process to write to, which then becomes `path`: a worker that outlives a killed parent for a moment disturbs nobody."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    yield aside
    aside.replace(path)
