"""Global batches for one rank: read from memory-mapped shards by a thread that stays one step ahead."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from harness.data.mixture import MixedTable, Mixture
from harness.data.order import ROW_MASK, SHIFT, Order
from harness.data.passed import Passed
from harness.data.rows import RowTable
from harness.errors import Failure, HarnessError

EMPTY = -1
OPENS, TRAINED = 1, 2
UNTRAINED = -100
AHEAD = 2
LOOK_S = 1.0
BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Batch:
    """A micro-batch as it travels to the device, three bytes a token where the vocabulary allows; the device widens it.

    Attributes:
        tokens: uint16 or int32 [micro_batch, sequence_length].
        marks: uint8, same shape: OPENS on the first token of each piece (the padding is a piece of its own), TRAINED on each label.
        first_row: index of the first row in the global batch.
    """

    tokens: np.ndarray
    marks: np.ndarray
    first_row: int

    @classmethod
    def of(cls, input_ids: np.ndarray, position_ids: np.ndarray, labels: np.ndarray, first_row: int) -> Batch:
        """From what a model takes; a label is its own token or UNTRAINED."""
        marks = (position_ids == 0) * np.uint8(OPENS) | (labels != UNTRAINED) * np.uint8(TRAINED)
        return cls(input_ids.astype(np.int32), marks, first_row)

    def pinned(self) -> Batch:
        """The same in page-locked memory."""
        import torch

        tokens, marks = (torch.from_numpy(array).pin_memory().numpy() for array in (self.tokens.view(np.int16 if self.tokens.itemsize == 2 else np.int32), self.marks))
        return Batch(tokens.view(self.tokens.dtype), marks, self.first_row)

    @property
    def input_ids(self) -> np.ndarray:
        """int64."""
        return self.tokens.astype(np.int64)

    @property
    def position_ids(self) -> np.ndarray:
        """int64, from 0 in each piece."""
        places = np.arange(self.tokens.shape[1])
        return places - np.maximum.accumulate(np.where(self.marks & OPENS, places, 0), axis=1)

    @property
    def labels(self) -> np.ndarray:
        """int64, UNTRAINED where nothing is trained."""
        return np.where(self.marks & TRAINED, self.input_ids, UNTRAINED)


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step's rows, as far as this rank computes them.

    Attributes:
        micro_batches: of this rank.
        trained_tokens: of the whole global batch, over all ranks.
        rows: real rows of the whole global batch.
        first_position: of the global batch in the order of training.
        end: the cursor after it: one more than its last position.
    """

    micro_batches: list[Batch]
    trained_tokens: int
    rows: int
    first_position: int
    end: int


class TokenReader:
    """Micro-batches of any rows, straight from the memory-mapped shards."""

    def __init__(self, table: RowTable | MixedTable):
        self.table = table
        self.dtype = np.int32 if table.vocab_size > 1 << 16 else np.uint16

    def batch(self, ids: np.ndarray, *, first_row: int) -> Batch:
        """The micro-batch of the rows `ids`; -1 is an empty row."""
        shape = (len(ids), self.table.sequence_length)
        tokens = np.full(shape, self.table.pad_token_id, self.dtype)
        marks = np.zeros(shape, np.uint8)
        for row_tokens, row_marks, row_id in zip(tokens, marks, ids.tolist(), strict=True):
            end = self._fill(row_tokens, row_marks, row_id) if row_id != EMPTY else 0
            if end < shape[1]:
                row_marks[end] = OPENS
        return Batch(tokens, marks, first_row)

    def _fill(self, tokens: np.ndarray, marks: np.ndarray, row_id: int) -> int:
        """Write one row; returns where its padding begins."""
        shard, row = self.table.shard(row_id >> SHIFT), row_id & ROW_MASK
        source, plan, at = shard.tokens, shard.plan, 0
        first, last = plan.span_starts[row : row + 2].tolist()
        for begin, end in plan.spans[first:last].tolist():
            marks[begin:end] = TRAINED
        first, last = plan.starts[row : row + 2].tolist()
        for start, stop in plan.pieces[first:last].tolist():
            marks[at] = OPENS
            end = at + stop - start
            tokens[at:end] = source[start:stop]
            at = end
        return at


@dataclass
class TrainLoader:
    """An iterator of global batches from a cursor on.

    Args:
        table: rows of the training set.
        order: in which they are trained.
        dp_rank: this data-parallel rank.
        dp_size: data-parallel ranks.
        micro_batch: rows of a forward pass.
        global_rows: rows of a step, over all ranks.
        start: rows consumed before.
        total_rows: rows of the whole run, after which it ends; None is endless.
        first_row: rows that were consumed before this order began.
        passed: positions that are left out.
        pinned: give arrays in page-locked memory, from which a GPU copies without waiting.

    Attributes:
        wait_seconds: how long the last batch was waited for.
        error: why no batch could be read, once that is so; empty rows follow.
        closed: ends the thread, and what it fetches.
    """

    table: RowTable | MixedTable
    order: Order | Mixture
    dp_rank: int
    dp_size: int
    micro_batch: int
    global_rows: int
    start: int = 0
    total_rows: int | None = None
    first_row: int = 0
    passed: Passed = Passed()
    pinned: bool = False
    wait_seconds: float = 0.0
    error: HarnessError | None = None
    _block: tuple[int, np.ndarray, np.ndarray] = field(default=(0, np.zeros(0, np.int64), np.zeros(1, np.int64)), repr=False)
    _queue: queue.Queue[Any] = field(default_factory=lambda: queue.Queue(AHEAD), repr=False)
    closed: threading.Event = field(default_factory=threading.Event, repr=False)
    _thread: threading.Thread | None = field(default=None, repr=False)
    _next: list[Any] = field(default_factory=list, repr=False)
    _waited: float = field(default=0.0, repr=False)

    def __iter__(self) -> Iterator[GlobalBatch]:
        while (item := self._take()) is not None:
            if isinstance(item, HarnessError):
                self.error = item
                yield self._filler()
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item

    def is_there(self, timeout_s: float) -> bool:
        """Whether the next batch, or why there is none, is there within a time."""
        self._begin()
        if not self._next and self.error is None:
            started = time.perf_counter()
            self._next += self._get(timeout_s)
            self._waited += time.perf_counter() - started
        return bool(self._next) or self.error is not None

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._produce, name="harness-data", daemon=True)
            self._thread.start()

    def _take(self) -> Any:
        started = time.perf_counter()
        self._begin()
        while not self._next and self.error is None:
            self._next += self._get(LOOK_S)
        item = self._next.pop() if self._next else self.error
        self.wait_seconds, self._waited = self._waited + time.perf_counter() - started, 0.0
        return item

    def _get(self, timeout_s: float) -> list[Any]:
        """What the thread gives next, if it comes within a time; for a thread that died without a word nobody waits."""
        with suppress(queue.Empty):
            return [self._queue.get(timeout=timeout_s)]
        is_dead = self._thread is not None and not self._thread.is_alive() and self._queue.empty()
        return [Failure("The thread that reads the data has died without a word.")] if is_dead else []

    def _filler(self) -> GlobalBatch:
        """Rows without tokens, with which a rank that cannot read goes along until all ranks know it; what they make of it is forgotten."""
        reader, slots = TokenReader(self.table), self.global_rows // (self.micro_batch * self.dp_size)
        micro = [reader.batch(np.full(self.micro_batch, EMPTY), first_row=0) for _ in range(slots)]
        return GlobalBatch(micro, 1, self.global_rows, self.start, self.start)

    def close(self, *, timeout_s: float | None = 5.0) -> None:
        """End the thread; without a timeout, whatever it takes."""
        self.closed.set()
        if self._thread is not None:
            self._thread.join(timeout=timeout_s)

    def _produce(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
        try:
            reader, position = TokenReader(self.table), self.passed.jump(self.start)
            while self.total_rows is None or position < self.total_rows:
                self.table.look_ahead(self.order, position - self.first_row)
                batch = self.global_batch(reader, position)
                if self.pinned:
                    batch = replace(batch, micro_batches=[micro.pinned() for micro in batch.micro_batches])
                if not self._put(batch):
                    return
                position = self.passed.jump(batch.end)
            self._put(None)
        except BaseException as error:  # shown by the thread that trains
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self.closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def global_batch(self, reader: TokenReader, position: int) -> GlobalBatch:
        """The global batch that starts at `position`, or at the next one that is not left out, for this rank."""
        position = self.passed.jump(position)
        real = self.global_rows if self.total_rows is None else min(self.global_rows, self.passed.trained(position, self.total_rows))
        rows, trained, done = np.full(self.global_rows, EMPTY, np.int64), 0, 0
        spans = self.passed.spans(position, real)
        for first, count in spans:
            rows[done : done + count], tokens = self._rows(first - self.first_row, count)
            done, trained = done + count, trained + tokens
        slots = self.global_rows // (self.micro_batch * self.dp_size)
        firsts = [(slot * self.dp_size + self.dp_rank) * self.micro_batch for slot in range(slots)]
        micro = [reader.batch(rows[first : first + self.micro_batch], first_row=first) for first in firsts]
        return GlobalBatch(micro, trained, real, position, sum(spans[-1]))

    def _rows(self, first: int, count: int) -> tuple[np.ndarray, int]:
        """The rows at some positions, and their trained tokens; the order is asked for many at a time."""
        begin, ids, trained = self._block
        if not begin <= first <= first + count <= begin + len(ids):
            begin, ids = first, self.order.rows(first, max(count, min(BLOCK_ROWS, self.order.ahead(first))))
            trained = np.cumsum(np.concatenate([[0], self.table.trained_tokens(ids)]))
            self._block = begin, ids, trained
        place = first - begin
        return ids[place : place + count], int(trained[place + count] - trained[place])


def eval_batches(
    table: RowTable, *, dp_rank: int, dp_size: int, micro_batch: int, errors: list[HarnessError], num_rows: int | None = None
) -> Iterator[Batch]:
    """Every row of a set, or the first `num_rows`, once over all ranks, padded with empty rows so that all ranks get equally many batches.

    Rows that cannot be read are put into `errors`, and empty ones stand for them until all ranks know it.
    """
    reader, portion = TokenReader(table), micro_batch * dp_size
    num_rows = table.num_rows if num_rows is None else min(num_rows, table.num_rows)
    for first in range(0, num_rows, portion):
        begin = first + dp_rank * micro_batch
        numbers = np.arange(begin, begin + micro_batch, dtype=np.int64)
        there = numbers < num_rows
        ids = np.full(micro_batch, EMPTY, np.int64)
        if not errors and there.any():
            ids[there] = table.ids(numbers[there])
            if table.store.is_remote:
                table.prefetch(iter(range(int(ids[0]) >> SHIFT, table.num_shards)), count=AHEAD)
        try:
            yield reader.batch(ids, first_row=begin)
        except HarnessError as error:
            errors.append(error)
            yield reader.batch(np.full(micro_batch, EMPTY), first_row=begin)
