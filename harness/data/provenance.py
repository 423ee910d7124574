"""Which documents a step trained on, and when a row was trained: answered from the index and the order alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from harness.config.schema import RunFile
from harness.data.order import Order
from harness.data.rows import RowTable
from harness.errors import Refused


@dataclass(frozen=True)
class Piece:
    """Part of a document in a row.

    Attributes:
        shard: name of its shard.
        document: its number in the shard.
        start: first token.
        stop: the token after the last.
        text: how it begins.
    """

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
        self.table = RowTable.build(folder, sequence_length=data.sequence_length, packing=data.packing, long_documents=data.long_documents)
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
        rows = self.order.rows(first, self.rows_at[step] - first).tolist()
        return [
            TrainedRow(first + place, (first + place) // self.order.num_rows, row, int(self.table.trained[row]), self._pieces(row, tokenizer, longest))
            for place, row in enumerate(rows)
        ]

    def steps_of_row(self, row: int) -> list[tuple[int, int, int | None]]:
        """When a row is trained.

        Returns:
            (epoch, position, step) for each epoch that the run has begun; the step is None where it was not reached yet.

        Raises:
            Refused: when the set has no such row.
        """
        if not 0 <= row < self.order.num_rows:
            raise Refused(f"The set has no row {row}.", where="ROW", remedy=f"Its rows are 0 to {self.order.num_rows - 1}.")
        consumed, found = max(self.rows_at.values(), default=0), []
        for epoch in range(max(0, consumed - 1) // self.order.num_rows + 1):
            position = self.order.position(row, epoch=epoch)
            found.append((epoch, position, next((step for step, rows in self.rows_at.items() if rows > position), None)))
        return found

    @cached_property
    def _documents(self) -> Any:
        import datasets

        return datasets.load_from_disk(str(self.folder))

    @cached_property
    def _before(self) -> list[int]:
        """Documents in front of each shard."""
        return [0, *accumulate(shard.rows for shard in self.table.index.shards)]

    def _pieces(self, row: int, tokenizer: Any, longest: int) -> list[Piece]:
        pieces = []
        for shard, document, start, stop in self.table.pieces_of(row).tolist():
            ids = self._documents[self._before[shard] + document]["input_ids"][start:stop]
            text = " ".join(tokenizer.decode(ids[: 2 * longest]).split())
            pieces.append(Piece(self.table.index.shards[shard].name, document, start, stop, text[:longest]))
        return pieces
