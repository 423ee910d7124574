"""Global batches for one rank: read from memory-mapped shards by a thread that stays one step ahead."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness.data.order import Order
from harness.data.rows import RowTable

EMPTY = -1
UNTRAINED = -100
AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """A micro-batch; every array is [micro_batch, sequence_length].

    Attributes:
        input_ids: int64.
        position_ids: int64, from 0 in each piece; the padding is a piece of its own.
        labels: int64, -100 where nothing is trained.
        documents: int32, number of the piece in its row.
        first_row: index of the first row in the global batch.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    documents: np.ndarray
    first_row: int


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step's rows, as far as this rank computes them.

    Attributes:
        micro_batches: of this rank.
        trained_tokens: of the whole global batch, over all ranks.
        rows: real rows of the whole global batch.
        first_position: of the global batch in the order of training.
    """

    micro_batches: list[Batch]
    trained_tokens: int
    rows: int
    first_position: int


class TokenReader:
    """Tokens and trained spans of any piece, straight from the memory-mapped shards."""

    def __init__(self, table: RowTable):
        self.table = table
        self._shards: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = {}

    def batch(self, rows: np.ndarray, *, first_row: int) -> Batch:
        """The micro-batch of `rows`; a row number of -1 is an empty row."""
        length, shape = self.table.sequence_length, (len(rows), self.table.sequence_length)
        ids = np.full(shape, self.table.index.pad_token_id, np.int64)
        labels = np.full(shape, UNTRAINED, np.int64)
        positions = np.zeros(shape, np.int64)
        documents = np.zeros(shape, np.int32)
        for place, row in enumerate(rows.tolist()):
            at, number = 0, 0
            pieces = self.table.pieces_of(row).tolist() if row != EMPTY else []
            for number, (shard, document, start, stop) in enumerate(pieces, 1):
                end = at + stop - start
                tokens, spans = self._document(shard, document)
                ids[place, at:end] = tokens[start:stop]
                positions[place, at:end] = np.arange(stop - start)
                documents[place, at:end] = number - 1
                for begin, finish in spans:
                    a, b = max(begin, start + 1) - start + at, min(finish, stop) - start + at
                    if b > a:
                        labels[place, a:b] = ids[place, a:b]
                at = end
            positions[place, at:] = np.arange(length - at)
            documents[place, at:] = number
        return Batch(ids, positions, labels, documents, first_row)

    def _document(self, shard: int, document: int) -> tuple[np.ndarray, list[list[int]]]:
        if shard not in self._shards:
            self._shards[shard] = self._open(shard)
        flat, offsets, spans, span_offsets = self._shards[shard]
        return flat[offsets[document] : offsets[document + 1]], spans[span_offsets[document] : span_offsets[document + 1], 1:].tolist()

    def _open(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        import pyarrow as pa

        name = self.table.index.shards[shard].name
        column = pa.ipc.open_stream(pa.memory_map(str(self.table.folder / f"{name}.arrow"))).read_all()["input_ids"].chunk(0)
        flat = column.values.to_numpy(zero_copy_only=True)
        offsets = column.offsets.to_numpy(zero_copy_only=True)
        spans = np.load(self.table.folder / f"{name}.spans.npy")
        counts = np.bincount(spans[:, 0], minlength=len(offsets) - 1) if len(spans) else np.zeros(len(offsets) - 1, np.int64)
        return flat, offsets, spans, np.concatenate([[0], np.cumsum(counts)])


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

    Attributes:
        wait_seconds: how long the last batch was waited for.
    """

    table: RowTable
    order: Order
    dp_rank: int
    dp_size: int
    micro_batch: int
    global_rows: int
    start: int = 0
    total_rows: int | None = None
    wait_seconds: float = 0.0
    _queue: queue.Queue[Any] = field(default_factory=lambda: queue.Queue(AHEAD), repr=False)
    _closed: threading.Event = field(default_factory=threading.Event, repr=False)
    _thread: threading.Thread | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[GlobalBatch]:
        self._thread = threading.Thread(target=self._produce, name="harness-data", daemon=True)
        self._thread.start()
        while True:
            started = time.perf_counter()
            item = self._queue.get()
            self.wait_seconds = time.perf_counter() - started
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _produce(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
        try:
            reader, position = TokenReader(self.table), self.start
            while self.total_rows is None or position < self.total_rows:
                batch = self.global_batch(reader, position)
                if not self._put(batch):
                    return
                position += batch.rows
            self._put(None)
        except BaseException as error:  # shown by the thread that trains
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def global_batch(self, reader: TokenReader, position: int) -> GlobalBatch:
        """The global batch that starts at `position`, for this rank."""
        real = self.global_rows if self.total_rows is None else min(self.global_rows, self.total_rows - position)
        rows = np.full(self.global_rows, EMPTY, np.int64)
        rows[:real] = self.order.rows(position, real)
        trained = int(self.table.trained_tokens(rows[:real]).sum())
        slots = self.global_rows // (self.micro_batch * self.dp_size)
        firsts = [(slot * self.dp_size + self.dp_rank) * self.micro_batch for slot in range(slots)]
        micro = [reader.batch(rows[first : first + self.micro_batch], first_row=first) for first in firsts]
        return GlobalBatch(micro, trained, real, position)


def eval_batches(table: RowTable, *, dp_rank: int, dp_size: int, micro_batch: int) -> Iterator[Batch]:
    """Every row of a set once over all ranks, padded with empty rows so that all ranks get equally many batches."""
    reader, portion = TokenReader(table), micro_batch * dp_size
    for first in range(0, table.num_rows, portion):
        begin = first + dp_rank * micro_batch
        rows = np.arange(begin, begin + micro_batch, dtype=np.int64)
        rows[rows >= table.num_rows] = EMPTY
        yield reader.batch(rows, first_row=begin)
