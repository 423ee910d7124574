"""Which documents a step trained on, and when a row was trained: answered from the index and the order alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.config.schema import RunFile
from harness.data.order import Order, shard_and_row
from harness.data.rows import Packing, RowTable
from harness.errors import Refused


@dataclass(frozen=True)
class Piece:
    """Part of a document in a row.

    Attributes:
        file: that the document came from.
        source_row: its row, line or document in that file, from 1.
        shard: name of its shard.
        document: its number in the shard.
        start: first token.
        stop: the token after the last.
        text: how it begins.
    """

    file: str
    source_row: int
    shard: str
    document: int
    start: int
    stop: int
    text: str


@dataclass(frozen=True)
class TrainedRow:
    """A row of a global batch.

    Attributes:
        position: in the order of training, from 0.
        epoch: from 0.
        row: its number in the set.
        trained_tokens: of the row.
        pieces: what it is made of.
    """

    position: int
    epoch: int
    row: int
    trained_tokens: int
    pieces: list[Piece]


class Provenance:
    """The order in which a run trains on a set.

    Args:
        folder: of the prepared training set.
        run: the run file as resolved.
        rows_at: rows consumed by the end of each recorded step.
        fingerprint: of the rows that the run trained on.

    Raises:
        Refused: when the folder holds no set, or other rows than those.
    """

    def __init__(self, folder: Path, run: RunFile, rows_at: dict[int, int], *, fingerprint: str):
        data = run.data
        if not (folder / "index.json").is_file():
            raise Refused(f"{folder} is not a prepared set.", where=str(folder), remedy="Give the folder `train` below the run's data.dir.")
        self.folder, self.run, self.rows_at = folder, run, dict(sorted(rows_at.items()))
        self.table = RowTable.build(folder, Packing.of(data))
        if self.table.fingerprint != fingerprint:
            raise Refused(
                f"The run did not train on the rows in {folder}, or they were prepared anew since.", where=str(folder),
                remedy="Give the folder `train` below the data.dir with which the run was started.",
            )
        self.order: Order = self.table.order(seed=run.train.seed, window_shards=data.window_shards)

    def rows_of_step(self, step: int, tokenizer: Any, *, longest: int = 60) -> list[TrainedRow]:
        """The rows of a recorded step, in the order of the global batch.

        Args:
            step: from 1.
            tokenizer: of the set.
            longest: characters of text shown of each piece.

        Raises:
            Refused: when the run has not recorded the step.
        """
        if step not in self.rows_at:
            known = f"steps {min(self.rows_at)} to {max(self.rows_at)}" if self.rows_at else "no step"
            raise Refused(f"The run has not recorded step {step}.", where="--step", remedy=f"It has recorded {known}.")
        first = max((rows for number, rows in self.rows_at.items() if number < step), default=0)
        ids = self.order.rows(first, self.rows_at[step] - first)
        trained = self.table.trained_tokens(ids).tolist()
        return [
            TrainedRow(first + place, (first + place) // self.order.num_rows, self.table.number(row_id), trained[place], self._pieces(row_id, tokenizer, longest))
            for place, row_id in enumerate(ids.tolist())
        ]

    def steps_of_row(self, row: int) -> list[tuple[int, int, int | None]]:
        """When a row is trained.

        Returns:
            (epoch, position, step) for each epoch that the run has begun; the step is None where it was not reached yet.

        Raises:
            Refused: when the set has no such row.
        """
        if not 0 <= row < self.table.num_rows:
            raise Refused(f"The set has no row {row}.", where="ROW", remedy=f"Its rows are 0 to {self.table.num_rows - 1}.")
        shard, place = (int(value) for value in shard_and_row(self.table.ids(np.asarray([row]))[0]))
        consumed, found = max(self.rows_at.values(), default=0), []
        for epoch in range(max(0, consumed - 1) // self.order.num_rows + 1):
            position = self.order.position(shard, place, epoch=epoch)
            found.append((epoch, position, next((step for step, rows in self.rows_at.items() if rows > position), None)))
        return found

    def _pieces(self, row_id: int, tokenizer: Any, longest: int) -> list[Piece]:
        shard = int(shard_and_row(np.asarray(row_id))[0])
        entry, (flat, offsets, *_) = self.table.index.shards[shard], self.table.shard(shard).tokens
        records = np.load(self.folder / f"{entry.name}.records.npy", mmap_mode="r")
        pieces = []
        for document, start, stop in self.table.pieces_of(row_id).tolist():
            file, row = entry.origin(int(records[document]))
            ids = flat[offsets[document] + start : offsets[document] + stop]
            text = " ".join(tokenizer.decode(ids[: 2 * longest].tolist()).split())
            pieces.append(Piece(file, row + 1, entry.name, document, start, stop, text[:longest]))
        return pieces
