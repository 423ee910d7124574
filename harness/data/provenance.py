"""Which documents a step trained on, and when a row was trained: answered from the index and the order alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from harness.config.schema import RunFile
from harness.data.mixture import MixedTable, Mixture
from harness.data.order import shard_and_row
from harness.data.passed import Passed
from harness.data.plans import wanted
from harness.data.rows import RowTable
from harness.data.sets import open_data, open_table
from harness.errors import HarnessError, Refused


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
        epoch: of the set, from 0.
        row: its number in the set.
        trained_tokens: of the row.
        pieces: what it is made of.
    """

    position: int
    epoch: int
    row: int
    trained_tokens: int
    pieces: list[Piece]


def origins(table: RowTable | MixedTable, row_id: int) -> list[tuple[str, int]]:
    """File, and row in it from 1, of each document of a row."""
    number, row = (int(value) for value in shard_and_row(np.asarray(row_id)))
    shard = table.shard(number)
    file = shard.entry.file("records.npy")
    records = np.load(shard.store.hold(wanted(file)))
    starts = shard.plan.pieces[shard.plan.starts[row] : shard.plan.starts[row + 1], 0]
    documents = np.searchsorted(shard.offsets, starts, side="right") - 1
    shard.store.release(file.name)
    return [(name, place + 1) for name, place in (shard.entry.origin(int(records[document])) for document in documents)]


class Provenance:
    """The order in which a run trains on a set.

    Args:
        place: folder or URL of the prepared training set, `train` below what the run file names.
        run: the run file as resolved.
        rows_at: rows consumed by the end of each recorded step.
        fingerprint: of the rows that the run trained on.
        first_row: rows that were consumed before their order began.
        passed: positions that the run left out after spikes.

    Raises:
        Refused: when there is no set, or another than those that the run trained on.
    """

    def __init__(self, place: str, run: RunFile, rows_at: dict[int, int], *, fingerprint: str, first_row: int = 0, passed: Passed = Passed()):
        self.run, self.rows_at, self.first_row, self.passed = run, dict(sorted(rows_at.items())), first_row, passed
        try:
            self.table = open_table(place, run.data)
        except HarnessError:
            raise Refused(f"{place} is not a prepared set.", where=place, remedy="Give `train` below the folder or URL that the run file names.") from None
        trained = open_data(run).train if run.data.sets else self.table
        tables = trained.tables if isinstance(trained, MixedTable) else [trained]
        self.which = next((number for number, table in enumerate(tables) if table.fingerprint == self.table.fingerprint), None)
        if trained.fingerprint != fingerprint or self.which is None:
            raise Refused(
                f"The run did not train on the rows in {place}, or they were prepared anew since.", where=place,
                remedy="Give `train` below a folder or URL with which the run was started.",
            )
        order = trained.order(seed=run.train.seed, window_shards=run.data.window_shards)
        self.order = order if isinstance(order, Mixture) else Mixture.of_one(order, self.table.num_rows)

    def rows_of_step(self, step: int, tokenizer: Any, *, longest: int = 60) -> list[TrainedRow]:
        """The rows of the set in a recorded step, in the order of the global batch.

        Args:
            step: from 1.
            tokenizer: of the set.
            longest: characters of text shown of each piece.

        Raises:
            Refused: when the run has not recorded the step, or trained it before data were appended.
        """
        if step not in self.rows_at:
            known = f"steps {min(self.rows_at)} to {max(self.rows_at)}" if self.rows_at else "no step"
            raise Refused(f"The run has not recorded step {step}.", where="--step", remedy=f"It has recorded {known}.")
        first = max((rows for number, rows in self.rows_at.items() if number < step), default=0)
        if first < self.first_row:
            raise Refused(f"Step {step} was trained before data were appended.", where="--step", remedy="Ask for a later one.")
        spans = self.passed.spans(first, self.passed.trained(first, self.rows_at[step]))
        draws = [self.order.draws(begin - self.first_row, size) for begin, size in spans]
        sets, numbers = (np.concatenate(part) for part in zip(*draws, strict=True))
        positions = np.concatenate([np.arange(begin, begin + size) for begin, size in spans])
        own = np.flatnonzero(sets == self.which)
        if not len(own):
            return []
        ids = self.order.orders[self.which].rows(int(numbers[own[0]]), len(own))
        trained = self.table.trained_tokens(ids).tolist()
        return [
            TrainedRow(place, number // self.table.num_rows, self.table.number(row_id), tokens, self._pieces(row_id, tokenizer, longest))
            for place, number, row_id, tokens in zip(positions[own].tolist(), numbers[own].tolist(), ids.tolist(), trained, strict=True)
        ]

    def steps_of_row(self, row: int) -> list[tuple[int, int | None, int | None]]:
        """When a row is trained.

        Returns:
            (epoch of the set, position, step) for each epoch that the run has begun; the position is None where a mixture never comes to it,
            the step where it was not reached yet, or is passed over (`passed.covers`).

        Raises:
            Refused: when the set has no such row.
        """
        if not 0 <= row < self.table.num_rows:
            raise Refused(f"The set has no row {row}.", where="ROW", remedy=f"Its rows are 0 to {self.table.num_rows - 1}.")
        shard, place = (int(value) for value in shard_and_row(self.table.ids(np.asarray([row]))[0]))
        consumed, found = max(self.rows_at.values(), default=0), []
        for epoch in count():
            number = self.order.orders[self.which].position(shard, place, epoch=epoch)
            position = self.order.position(self.which, number)
            begun = self.order.position(self.which, epoch * self.table.num_rows)
            if epoch and (begun is None or begun + self.first_row >= consumed):
                return found
            at = None if position is None else position + self.first_row
            never = at is None or self.passed.covers(at)
            found.append((epoch, at, None if never else next((step for step, rows in self.rows_at.items() if rows > at), None)))

    def _pieces(self, row_id: int, tokenizer: Any, longest: int) -> list[Piece]:
        number, row = (int(value) for value in shard_and_row(np.asarray(row_id)))
        shard = self.table.shard(number)
        entry, plan, offsets = shard.entry, shard.plan, shard.offsets
        records = np.load(self.table.store.hold(wanted(entry.file("records.npy"))))
        pieces = []
        for start, stop in plan.pieces[plan.starts[row] : plan.starts[row + 1]].tolist():
            document = int(np.searchsorted(offsets, start, side="right")) - 1
            file, source_row = entry.origin(int(records[document]))
            text = " ".join(tokenizer.decode(shard.tokens[start : min(stop, start + 2 * longest)].tolist()).split())
            origin = int(offsets[document])
            pieces.append(Piece(file, source_row + 1, entry.name, document, start - origin, stop - origin, text[:longest]))
        self.table.store.release(entry.file("records.npy").name)
        return pieces
