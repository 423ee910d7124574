"""Training rows: pieces of documents packed to the sequence length, a shard at a time, computed from its arrays of lengths and spans."""

from __future__ import annotations

import json
import os
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from harness import files
from harness.config.schema import Data, RunFile
from harness.data.order import VERSION as ORDER_VERSION
from harness.data.order import Order, row_ids, shard_and_row
from harness.data.store import LocalStore, Store, Wanted
from harness.errors import Failure
from harness.formats.index import NAME as INDEX
from harness.formats.index import ShardEntry, ShardFile, ShardSetIndex, parse_index, shard_name

PACKING_VERSION = 2
HEAD = 5
OPEN_SHARDS = 64
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Packing:
    """How documents become rows.

    Attributes:
        sequence_length: tokens of a row.
        how: none or best_fit.
        long_documents: cut (at multiples of the sequence length), truncate or drop.
    """

    sequence_length: int
    how: str
    long_documents: str

    @classmethod
    def of(cls, data: Data) -> Packing:
        """That of a run file."""
        return cls(data.sequence_length, data.packing, data.long_documents)

    def fingerprint(self, index_fingerprint: str) -> str:
        """What the rows of a set depend on."""
        return files.digest_text(index_fingerprint, str(self.sequence_length), self.how, self.long_documents, str(PACKING_VERSION))


@dataclass(frozen=True)
class Plan:
    """The rows of one shard.

    Attributes:
        pieces: int32 [num_pieces, 2]: first token and the one after the last, in the shard's token array; the pieces of a row stand together.
        starts: int32 [num_rows + 1]: where the pieces of each row begin.
        spans: int32 [num_spans, 2]: what is trained, as places in its row; the first token of a piece never is.
        span_starts: int32 [num_rows + 1]: where the spans of each row begin.
        trained: int32 [num_rows]: trained tokens of each row.
        truncated: documents that lost their end.
        dropped: documents that were left out for their length.
    """

    pieces: np.ndarray
    starts: np.ndarray
    spans: np.ndarray
    span_starts: np.ndarray
    trained: np.ndarray
    truncated: int
    dropped: int

    @property
    def num_rows(self) -> int:
        """Rows of the shard."""
        return len(self.trained)

    @classmethod
    def make(cls, lengths: np.ndarray, spans: np.ndarray, packing: Packing) -> Plan:
        """Cut and pack the documents of a shard.

        Args:
            lengths: integers [documents].
            spans: integers [spans, 3]: document, start, stop of what is trained, ordered by document.
            packing: how.
        """
        lengths = lengths.astype(np.int64)
        pieces, lost = cut(lengths, packing.sequence_length, packing.long_documents)
        order, ends = _pack(pieces[:, 2] - pieces[:, 1], packing.sequence_length, packing.how)
        pieces, starts = pieces[order], np.concatenate([[0], ends])
        sizes = pieces[:, 2] - pieces[:, 1]
        row_of = np.repeat(np.arange(len(ends)), np.diff(starts))
        begins = np.cumsum(sizes) - sizes
        places = begins - begins[starts[:-1]][row_of]
        owner, first, last = spans_in_pieces(pieces, spans.astype(np.int64), len(lengths))
        shift = places[owner] - pieces[owner, 1]
        sources = (np.cumsum(lengths) - lengths)[pieces[:, 0]]
        return cls(
            (pieces[:, 1:] + sources[:, None]).astype(np.int32), starts.astype(np.int32),
            np.column_stack([first + shift, last + shift]).astype(np.int32),
            np.searchsorted(row_of[owner], np.arange(len(ends) + 1)).astype(np.int32),
            np.bincount(row_of[owner], weights=last - first, minlength=len(ends)).astype(np.int32), *lost.tolist(),
        )

    @classmethod
    def open(cls, path: Path) -> Plan:
        """Memory-mapped, as `write` left it."""
        flat = np.asarray(np.load(path, mmap_mode="r"))
        num_rows, num_pieces, num_spans, truncated, dropped = flat[:HEAD].tolist()
        ends = np.cumsum([HEAD, num_rows + 1, num_rows + 1, num_rows, 2 * num_pieces, 2 * num_spans])
        starts, span_starts, trained, pieces, spans = (flat[a:b] for a, b in pairwise(ends.tolist()))
        return cls(pieces.reshape(-1, 2), starts, spans.reshape(-1, 2), span_starts, trained, truncated, dropped)

    def write(self, path: Path) -> None:
        """One int32 array: five counts, starts, starts of spans, trained, pieces, spans."""
        head = np.asarray([self.num_rows, len(self.pieces), len(self.spans), self.truncated, self.dropped], np.int32)
        flat = np.concatenate([head, self.starts, self.span_starts, self.trained, self.pieces.ravel(), self.spans.ravel()])
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        with open(aside, "wb") as stream:
            np.save(stream, flat)
        os.replace(aside, path)


def plan_folder(folder: Path, packing: Packing, fingerprint: str) -> Path:
    """Where the plans of a set's shards under one packing are kept."""
    return folder / f"rows-{packing.fingerprint(fingerprint)[:16]}"


def write_plan(folder: Path, name: str, lengths: np.ndarray, spans: np.ndarray, packing: Packing, *, fingerprint: str) -> None:
    """Pack one shard as soon as it is made, so that nobody waits for the packing of the whole set."""
    plans = plan_folder(folder, packing, fingerprint)
    plans.mkdir(exist_ok=True)
    Plan.make(lengths, spans, packing).write(plans / f"{name}.npy")


@dataclass
class OpenShard:
    """A shard in use: its plan and, when asked for, its tokens, memory-mapped; the store keeps its files until it is closed."""

    store: Store
    entry: ShardEntry
    plan: Plan
    holds: list[str]

    @cached_property
    def tokens(self) -> np.ndarray:
        """uint16 or int32 [tokens]: the ids of all documents, one after the other."""
        return _values(self._column.values)

    @cached_property
    def offsets(self) -> np.ndarray:
        """int32 [documents + 1]: where each document begins."""
        return _values(self._column.offsets)

    @cached_property
    def _column(self) -> Any:
        import pyarrow as pa

        file = self.entry.file("arrow")
        path = self.store.hold(wanted(file))
        self.holds.append(file.name)
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()["input_ids"].chunk(0)

    def close(self) -> None:
        """Let go of the memory maps, then of the files."""
        for name in ("tokens", "offsets", "_column", "plan"):
            self.__dict__.pop(name, None)
        for name in self.holds:
            self.store.release(name)


def _values(array: Any) -> np.ndarray:
    """The numbers of an Arrow array without a copy; its own `to_numpy` would import pandas."""
    return np.frombuffer(array.buffers()[1], array.type.to_pandas_dtype())[array.offset : array.offset + len(array)]


def wanted(file: ShardFile, folder: str = "") -> Wanted:
    """A file of the index as a store is asked for it."""
    return Wanted(f"{folder}{file.name}", file.bytes, file.digest)


@dataclass(frozen=True)
class Summary:
    """What the plans of a set add up to.

    Attributes:
        rows: of each shard.
        filled: positions of each shard that hold a token.
        trained: tokens of each shard.
        truncated: documents that lost their end.
        dropped: documents that were left out for their length.
        sizes: bytes of each plan's file; empty where plans are kept nowhere.
        digests: of the same.
    """

    rows: list[int]
    filled: list[int]
    trained: list[int]
    truncated: int
    dropped: int
    sizes: list[int]
    digests: list[str]

    @classmethod
    def of(cls, plans: list[Plan], files: list[ShardFile]) -> Summary:
        """Add up."""
        return cls(
            [plan.num_rows for plan in plans], [int((plan.pieces[:, 1] - plan.pieces[:, 0]).sum(dtype=np.int64)) for plan in plans],
            [int(plan.trained.sum(dtype=np.int64)) for plan in plans], sum(plan.truncated for plan in plans), sum(plan.dropped for plan in plans),
            [file.bytes for file in files], [file.digest for file in files],
        )

    @classmethod
    def from_json(cls, text: bytes) -> Summary:
        """As `as_json` wrote it."""
        return cls(**orjson.loads(text))

    def as_json(self) -> str:
        """Readable without this class."""
        return json.dumps(self.__dict__)


@dataclass(frozen=True)
class RowTable:
    """All rows of a set under one packing. A row is known by its `row_ids`: shard and place in it.

    Attributes:
        store: of the set.
        index: of the set.
        packing: how documents became rows.
        summary: of all plans.
        plans: where the plans are.
        open_shards: how many shards stay open.
    """

    store: Store
    index: ShardSetIndex
    packing: Packing
    summary: Summary
    plans: PlanSource
    open_shards: int = OPEN_SHARDS
    _open: OrderedDict[int, OpenShard] = field(default_factory=OrderedDict, repr=False, compare=False)
    _coming: list[int] = field(default_factory=list, repr=False, compare=False)

    @property
    def sequence_length(self) -> int:
        """Tokens of a row."""
        return self.packing.sequence_length

    @property
    def template(self) -> dict[str, Any]:
        """How examples became text."""
        return self.index.template

    @property
    def vocab_size(self) -> int:
        """Largest token id that the tokenizer can give, plus one."""
        return self.index.vocab_size

    @property
    def pad_token_id(self) -> int:
        """What stands where nothing is."""
        return self.index.pad_token_id

    @property
    def fingerprint(self) -> str:
        """Of data, packing and order: what a cursor means, besides the seed."""
        return files.digest_text(self.packing.fingerprint(self.index.fingerprint), str(ORDER_VERSION))

    @property
    def is_whole(self) -> bool:
        """Whether all shards are there."""
        return True

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return sum(self.summary.rows)

    @property
    def num_shards(self) -> int:
        """Shards of the set."""
        return len(self.index.shards)

    @property
    def filled_share(self) -> float:
        """Share of positions that hold a token of a document."""
        return sum(self.summary.filled) / max(1, self.num_rows * self.sequence_length)

    @cached_property
    def ends(self) -> np.ndarray:
        """int64 [shards]: rows up to the end of each shard, for people's numbers of rows."""
        return np.cumsum(np.asarray(self.summary.rows, np.int64))

    def order(self, *, seed: int, window_shards: int) -> Order:
        """The order in which a run trains on these rows."""
        return Order(self.num_shards, self.summary.rows.__getitem__, seed, window_shards)

    def ids(self, numbers: np.ndarray) -> np.ndarray:
        """`row_ids` of rows numbered shard after shard."""
        shards = np.searchsorted(self.ends, numbers, side="right")
        before = np.concatenate([[0], self.ends])[shards]
        return row_ids(shards, numbers - before)

    def number(self, row_id: int) -> int:
        """The number of a row, shard after shard."""
        shard, row = (int(value) for value in shard_and_row(np.asarray(row_id)))
        return int(self.ends[shard]) - self.summary.rows[shard] + row

    def trained_tokens(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n]: how many labels of each row are trained."""
        shards, rows = shard_and_row(ids)
        found = np.empty(len(ids), np.int64)
        for shard in np.unique(shards).tolist():
            chosen = shards == shard
            found[chosen] = self.shard(shard).plan.trained[rows[chosen]]
        return found

    def shard(self, number: int) -> OpenShard:
        """A shard, opened; the longest unused one is closed when there are too many."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= self.open_shards:
            self._open.popitem(last=False)[1].close()
        self._open[number] = self._opened(number)
        return self._open[number]

    def _opened(self, number: int) -> OpenShard:
        plan, holds = self.plans.plan(number)
        return OpenShard(self.store, self.index.shards[number], plan, holds)

    def look_ahead(self, order: Order, position: int) -> None:
        """Have the shards fetched that are needed from a position on, a window and the next one, as far as there is room."""
        if self.store.is_remote:
            self.prefetch(order.shards_from(position), count=2 * order.window_shards)

    def prefetch(self, shards: Iterator[int], *, count: int) -> None:
        """Name the shards that are needed next; nothing is done when they are the same as before."""
        coming = list(islice(shards, count))
        if coming != self._coming:
            self._coming[:] = coming
            self.store.prefetch([
                file for number in dict.fromkeys(coming) if number not in self._open
                for file in (*self.plans.files(number), wanted(self.index.shards[number].file("arrow")))
            ])

    def close(self) -> None:
        """Let go of all shards and end the store's thread."""
        while self._open:
            self._open.popitem()[1].close()
        self.store.close()

    @classmethod
    def of_run(cls, run: RunFile, which: str) -> RowTable:
        """The rows of a run's prepared `train` or `validation` set."""
        return cls.build(Path(run.data.dir) / which, Packing.of(run.data))

    @classmethod
    def build(cls, folder: Path, packing: Packing) -> RowTable:
        """The rows of a set in a folder."""
        return cls.open(LocalStore(folder), packing, local=folder if os.access(folder, os.W_OK) else None)

    @classmethod
    def open(cls, store: Store, packing: Packing, *, local: Path | None, open_shards: int = OPEN_SHARDS) -> RowTable:
        """The rows of a prepared set: planned while it was made, or now.

        Args:
            store: of the set.
            packing: how documents become rows.
            local: where plans that the store lacks are kept; None keeps none.
            open_shards: how many shards stay open.

        Raises:
            Failure: when there is no prepared set.
        """
        index = parse_index(store.read_small(INDEX))
        if index is None:
            raise Failure(f"{store.url} is not a prepared set; run `harness prepare`.")
        plans = PlanSource(store, index, packing, local)
        return cls(store, index, packing, plans.summary(), plans, open_shards)


@dataclass
class PlanSource:
    """Where the plans of a set's shards come from: they lie in its store, or they are made here.

    Args:
        store: of the set.
        index: of the set.
        packing: how documents become rows.
        local: folder in which plans are kept that were made here; None keeps none.
    """

    store: Store
    index: ShardSetIndex
    packing: Packing
    local: Path | None
    _in_store: Summary | None = None

    @property
    def name(self) -> str:
        """Of the folder of plans, below the set or `local`."""
        return plan_folder(Path(), self.packing, self.index.fingerprint).name

    def summary(self) -> Summary:
        """That of all plans; makes those that are nowhere yet."""
        if (text := self.store.read_small(f"{self.name}/{SUMMARY}")) is not None:
            self._in_store = Summary.from_json(text)
            return self._in_store
        kept = self.local / self.name / SUMMARY if self.local else None
        if kept is not None and kept.is_file():
            return Summary.from_json(kept.read_bytes())
        return self.make()

    def make(self) -> Summary:
        """Plan the shards that are not planned yet, and keep what all plans add up to."""
        plans = [self._own(number) for number in range(len(self.index.shards))]
        if self.local is None:
            return Summary.of(plans, [])
        summary = Summary.of(plans, [ShardFile.of(self._path(entry.name)) for entry in self.index.shards])
        files.write_text(self.local / self.name / SUMMARY, summary.as_json())
        return summary

    def plan(self, number: int) -> tuple[Plan, list[str]]:
        """The plan of a shard, and the names of files that the store holds for it."""
        if self._in_store is None:
            return self._own(number), []
        [file] = self.files(number)
        return Plan.open(self.store.hold(file)), [file.name]

    def files(self, number: int) -> list[Wanted]:
        """What the store has to hold for the plan of a shard."""
        if self._in_store is None:
            return []
        return [Wanted(f"{self.name}/{shard_name(number)}.npy", self._in_store.sizes[number], self._in_store.digests[number])]

    def size(self, number: int) -> int:
        """Bytes of them."""
        return self._in_store.sizes[number] if self._in_store else 0

    def _path(self, shard: str) -> Path:
        assert self.local is not None
        return self.local / self.name / f"{shard}.npy"

    def _own(self, number: int) -> Plan:
        entry = self.index.shards[number]
        if self.local is not None and self._path(entry.name).is_file():
            return Plan.open(self._path(entry.name))
        sources = [entry.file("lengths.npy"), entry.file("spans.npy")]
        plan = Plan.make(*(np.load(self.store.hold(wanted(file))) for file in sources), self.packing)
        for file in sources:
            self.store.release(file.name)
        if self.local is not None:
            self._path(entry.name).parent.mkdir(parents=True, exist_ok=True)
            plan.write(self._path(entry.name))
        return plan


def cut(lengths: np.ndarray, length: int, long_documents: str) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents into pieces of at most `length` tokens.

    Returns:
        (int64 [pieces, 3]: document, start, stop; int64 [2]: truncated and dropped documents).
    """
    documents = np.arange(len(lengths), dtype=np.int64)
    long = lengths > length
    lost = np.zeros(2, np.int64)
    if long_documents == "truncate":
        lost[0] = long.sum()
        return np.column_stack([documents, np.zeros_like(documents), np.minimum(lengths, length)]), lost
    if long_documents == "drop":
        lost[1] = long.sum()
        kept = documents[~long]
        return np.column_stack([kept, np.zeros_like(kept), lengths[kept]]), lost
    counts = -(-lengths // length)
    owner = np.repeat(documents, counts)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.column_stack([owner, place * length, np.minimum((place + 1) * length, lengths[owner])]), lost


def spans_in_pieces(pieces: np.ndarray, spans: np.ndarray, num_documents: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is trained of each piece: the tokens that a span covers, the first of the piece left out.

    Args:
        pieces: int64 [pieces, 3]: document, start, stop.
        spans: int64 [spans, 3]: document, start, stop, ordered by document.
        num_documents: of the shard.

    Returns:
        int64 each, ordered by piece: its number, first and one after the last token, as places in its document.
    """
    counts = np.bincount(spans[:, 0], minlength=num_documents) if len(spans) else np.zeros(num_documents, np.int64)
    first = np.cumsum(counts) - counts
    per_piece = counts[pieces[:, 0]]
    owner = np.repeat(np.arange(len(pieces)), per_piece)
    which = np.arange(per_piece.sum()) - np.repeat(np.cumsum(per_piece) - per_piece, per_piece) + np.repeat(first[pieces[:, 0]], per_piece)
    begin = np.maximum(spans[which, 1], pieces[owner, 1] + 1)
    end = np.minimum(spans[which, 2], pieces[owner, 2])
    there = end > begin
    return owner[there], begin[there], end[there]


def _pack(sizes: np.ndarray, length: int, packing: str) -> tuple[np.ndarray, np.ndarray]:
    """(order of the pieces, where each row ends in that order)."""
    if packing == "none":
        return np.arange(len(sizes)), np.arange(1, len(sizes) + 1, dtype=np.int64)
    rows = best_fit(sizes, length)
    order = np.asarray([piece for row in rows for piece in row], dtype=np.int64)
    return order, np.cumsum([len(row) for row in rows]).astype(np.int64)


def best_fit(sizes: np.ndarray, length: int) -> list[list[int]]:
    """Best-fit decreasing (Johnson, 1973): each piece, longest first, goes where the least room is left over.

    Args:
        sizes: tokens of each piece, at most `length`.
        length: room of a row.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        place = bisect_left(rooms, size)
        if place == len(rooms):
            row, room = len(rows), length
            rows.append([])
        else:
            room = rooms[place]
            row = by_room[room].pop(0)
            if not by_room[room]:
                del by_room[room], rooms[place]
        rows[row].append(piece)
        if left := room - size:
            if left not in by_room:
                by_room[left] = []
                insort(rooms, left)
            by_room[left].append(row)
    return rows
