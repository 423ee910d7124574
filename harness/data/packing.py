"""How documents become rows: cut to the sequence length and packed, a shard at a time, from its arrays of lengths and spans."""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from harness import files
from harness.config.schema import Data

PACKING_VERSION = 2
HEAD = 5


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
    full, short = np.flatnonzero(sizes == length), np.flatnonzero(sizes < length)
    rows = best_fit(sizes[short], length)
    order = short[np.asarray([piece for row in rows for piece in row], dtype=np.int64)]
    return np.concatenate([full, order]), np.cumsum([*[1] * len(full), *map(len, rows)], dtype=np.int64)


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
