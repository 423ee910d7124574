"""Training rows: pieces of documents packed to the sequence length, opened a shard at a time."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from harness import files
from harness.config.schema import RunFile
from harness.data.lazy import lazy
from harness.data.order import VERSION as ORDER_VERSION
from harness.data.order import Order, row_ids, shard_and_row
from harness.data.packing import Packing, Plan
from harness.data.plans import PlanSource, Summary, wanted
from harness.data.store import LocalStore, Store
from harness.errors import Failure
from harness.formats.index import NAME as INDEX
from harness.formats.index import ShardEntry, ShardSetIndex, parse_index

OPEN_SHARDS = 64


@dataclass
class OpenShard:
    """A shard in use: its plan and, when asked for, its tokens, memory-mapped; the store keeps its files until it is closed."""

    store: Store
    entry: ShardEntry
    plan: Plan
    holds: list[str]

    @lazy
    def tokens(self) -> np.ndarray:
        """uint16 or int32 [tokens]: the ids of all documents, one after the other."""
        return _values(self._column.values)

    @lazy
    def offsets(self) -> np.ndarray:
        """int32 [documents + 1]: where each document begins."""
        return _values(self._column.offsets)

    @lazy
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
    def may_wait(self) -> bool:
        """Whether its rows may have to be waited for: they are far away."""
        return self.store.is_remote

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

    @lazy
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

    def heed(self, given_up: Callable[[], bool]) -> None:
        """Let a wait for a shard end with a Failure when `given_up` says so."""
        self.store.heed(given_up)

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
