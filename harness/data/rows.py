"""Training rows: pieces of documents packed to the sequence length, computed from the index alone."""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness import files
from harness.config.schema import RunFile
from harness.data.order import VERSION as ORDER_VERSION
from harness.data.order import Order
from harness.errors import Failure
from harness.formats.index import ShardSetIndex, read_index

PACKING_VERSION = 1


@dataclass(frozen=True)
class RowTable:
    """All rows of a set under one sequence length.

    Attributes:
        folder: of the set.
        index: of the set.
        sequence_length: tokens of a row.
        fingerprint: of data and packing: what the order of rows depends on, besides the seed.
        pieces: int64 [num_pieces, 4]: shard, document in it, start, stop; the pieces of a row stand together.
        starts: int64 [num_rows + 1]: where the pieces of each row begin.
        trained: int64 [num_rows]: trained tokens of each row.
        truncated: documents that lost their end.
        dropped: documents that were left out for their length.
    """

    folder: Path
    index: ShardSetIndex
    sequence_length: int
    fingerprint: str
    pieces: np.ndarray
    starts: np.ndarray
    trained: np.ndarray
    truncated: int
    dropped: int

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return len(self.starts) - 1

    @property
    def filled_share(self) -> float:
        """Share of positions that hold a token of a document."""
        filled = int((self.pieces[:, 3] - self.pieces[:, 2]).sum())
        return filled / max(1, self.num_rows * self.sequence_length)

    def order(self, *, seed: int, window_shards: int) -> Order:
        """The order in which a run trains on these rows."""
        shards = self.pieces[self.starts[:-1], 0]
        return Order(np.bincount(shards, minlength=len(self.index.shards)), seed, window_shards)

    def trained_tokens(self, row_ids: np.ndarray) -> np.ndarray:
        """int64 [n]: how many labels of each row are trained."""
        return self.trained[row_ids]

    def pieces_of(self, row: int) -> np.ndarray:
        """int64 [pieces, 4] of one row."""
        return self.pieces[self.starts[row] : self.starts[row + 1]]

    @classmethod
    def of_run(cls, run: RunFile, which: str) -> RowTable:
        """The rows of a run's prepared `train` or `validation` set."""
        data = run.data
        return cls.build(Path(data.dir) / which, sequence_length=data.sequence_length, packing=data.packing, long_documents=data.long_documents)

    @classmethod
    def build(cls, folder: Path, *, sequence_length: int, packing: str, long_documents: str) -> RowTable:
        """Compute the rows of a set, or read them from the cache beside it.

        Args:
            folder: of a prepared set.
            sequence_length: tokens of a row.
            packing: none or best_fit.
            long_documents: cut (at multiples of the sequence length), truncate or drop.
        """
        index = read_index(folder)
        if index is None:
            raise Failure(f"{folder} is not a prepared set; run `harness prepare`.")
        order = [f"order {ORDER_VERSION}"] if len(index.shards) > 1 else []  # the order within one shard has never changed
        key = files.digest_text(index.fingerprint, str(sequence_length), packing, long_documents, str(PACKING_VERSION), *order)
        cache = folder / f"rows-{key[:16]}.npz"
        if cache.is_file():
            with np.load(cache) as held:
                arrays = {name: held[name] for name in ("pieces", "starts", "trained", "lost")}
        else:
            arrays = _compute(folder, index, sequence_length, packing, long_documents)
            _write_cache(cache, arrays)
        truncated, dropped = arrays["lost"].tolist()
        return cls(folder, index, sequence_length, key, arrays["pieces"], arrays["starts"], arrays["trained"], truncated, dropped)


def _compute(folder: Path, index: ShardSetIndex, length: int, packing: str, long_documents: str) -> dict[str, np.ndarray]:
    all_pieces, all_trained, starts, lost = [], [], [np.zeros(1, np.int64)], np.zeros(2, np.int64)
    held = 0
    for number, shard in enumerate(index.shards):
        lengths = np.load(folder / f"{shard.name}.lengths.npy").astype(np.int64)
        spans = np.load(folder / f"{shard.name}.spans.npy").astype(np.int64)
        pieces, losses = cut(lengths, length, long_documents)
        lost += losses
        order, ends = _pack(pieces[:, 2] - pieces[:, 1], length, packing)
        pieces = pieces[order]
        trained = trained_in_pieces(pieces, spans, len(lengths))
        all_pieces.append(np.column_stack([np.full(len(pieces), number, np.int64), pieces]))
        all_trained.append(np.add.reduceat(trained, np.concatenate([[0], ends[:-1]])) if len(ends) else np.zeros(0, np.int64))
        starts.append(ends + held)
        held += len(pieces)
    return {
        "pieces": np.concatenate(all_pieces) if all_pieces else np.zeros((0, 4), np.int64),
        "starts": np.concatenate(starts),
        "trained": np.concatenate(all_trained) if all_trained else np.zeros(0, np.int64),
        "lost": lost,
    }


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


def trained_in_pieces(pieces: np.ndarray, spans: np.ndarray, num_documents: int) -> np.ndarray:
    """int64 [pieces]: tokens of each piece that a span covers, the first of the piece left out.

    Args:
        pieces: int64 [pieces, 3]: document, start, stop.
        spans: int64 [spans, 3]: document, start, stop, ordered by document.
        num_documents: of the shard.
    """
    counts = np.bincount(spans[:, 0], minlength=num_documents) if len(spans) else np.zeros(num_documents, np.int64)
    first = np.cumsum(counts) - counts
    per_piece = counts[pieces[:, 0]]
    owner = np.repeat(np.arange(len(pieces)), per_piece)
    which = np.arange(per_piece.sum()) - np.repeat(np.cumsum(per_piece) - per_piece, per_piece) + np.repeat(first[pieces[:, 0]], per_piece)
    begin = np.maximum(spans[which, 1], pieces[owner, 1] + 1)
    end = np.minimum(spans[which, 2], pieces[owner, 2])
    return np.bincount(owner, weights=np.maximum(0, end - begin), minlength=len(pieces)).astype(np.int64)


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


def _write_cache(path: Path, arrays: dict[str, np.ndarray]) -> None:
    if not os.access(path.parent, os.W_OK):
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}.npz")
    np.savez(aside, **arrays)
    os.replace(aside, path)
