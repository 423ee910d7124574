"""Several sets trained as one: which set each row comes from is a pure function of weights, sizes, caps and seed, like the order within a set."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from harness import files
from harness.data.order import Order, permute, row_ids, shard_and_row
from harness.data.rows import OpenShard, RowTable

PERIOD = 1024
"""Rows in which every set has its exact share."""


@dataclass(frozen=True)
class Share:
    """A set's part in a mixture.

    Attributes:
        name: for people.
        weight: in proportion to the others'.
        max_epochs: passes after which it is used up, or None.
    """

    name: str
    weight: float
    max_epochs: float | None


@dataclass(frozen=True)
class Phase:
    """A stretch in which the same sets are drawn from.

    Attributes:
        begin: its first position.
        length: positions, or None for the last one without an end.
        drawn: rows of each set that were drawn before.
        counts: rows of each set in a period; 0 for sets that are used up.
    """

    begin: int
    length: int | None
    drawn: tuple[int, ...]
    counts: tuple[int, ...]


def apportion(weights: list[float], seats: int) -> list[int]:
    """Whole seats by weight, at least one for each weight above 0: the largest remainders (Hamilton's method), ties to the first."""
    total = sum(map(Fraction, weights))
    quotas = [Fraction(weight) * seats / total for weight in weights]
    counts = [max(1, int(quota)) if quota else 0 for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
    for place in range(seats - sum(counts)):
        counts[by_remainder[place % len(counts)]] += 1
    while sum(counts) > seats:
        counts[max(range(len(counts)), key=lambda i: (counts[i], -i))] -= 1
    return counts


class Mixture:
    """The order of a mixture: the same interface as `Order`, with row ids whose shards are numbered over all sets.

    Args:
        orders: of each set.
        sizes: rows of each set.
        shares: of each set.
        first_shards: number of each set's first shard.
        seed: of the run.
    """

    def __init__(self, orders: list[Order], sizes: list[int], shares: list[Share], first_shards: list[int], seed: int):
        self.orders, self.sizes, self.shares, self.first_shards, self.seed = orders, sizes, shares, first_shards, seed

    @classmethod
    def of_one(cls, order: Order, size: int) -> Mixture:
        """A set alone."""
        return cls([order], [size], [Share("", 1.0, None)], [0], order.seed)

    @property
    def num_rows(self) -> int:
        """Rows of all sets: what an epoch of a mixture is counted in."""
        return sum(self.sizes)

    @cached_property
    def total_rows(self) -> int | None:
        """Positions after which every set is used up, or None."""
        last = self.phases[-1]
        return None if last.length is None else last.begin + last.length

    @cached_property
    def phases(self) -> list[Phase]:
        """One more whenever a set is used up."""
        limits = [None if share.max_epochs is None else max(1, int(share.max_epochs * size)) for share, size in zip(self.shares, self.sizes, strict=True)]
        phases: list[Phase] = []
        begin, drawn = 0, [0] * len(limits)
        while True:
            active = [limit is None or done < limit for limit, done in zip(limits, drawn, strict=True)]
            if not any(active):
                return phases
            counts = apportion([share.weight if on else 0.0 for share, on in zip(self.shares, active, strict=True)], PERIOD)
            ends = [
                self._place_of(len(phases), counts, which, limit - drawn[which]) + 1
                for which, limit in enumerate(limits) if active[which] and limit is not None
            ]
            length = min(ends, default=None)
            phases.append(Phase(begin, length, tuple(drawn), tuple(counts)))
            if length is None:
                return phases
            taken = self._drawn_until(len(phases) - 1, counts, length)
            begin, drawn = begin + length, [done + more for done, more in zip(drawn, taken, strict=True)]

    def rows(self, first: int, count: int) -> np.ndarray:
        """int64 [count]: the row ids at positions `first` to `first + count`."""
        found = np.empty(count, np.int64)
        sets, numbers = self.draws(first, count)
        for which in np.unique(sets).tolist():
            chosen = np.flatnonzero(sets == which)
            shards, rows = shard_and_row(self.orders[which].rows(int(numbers[chosen[0]]), len(chosen)))
            found[chosen] = row_ids(shards + self.first_shards[which], rows)
        return found

    def ahead(self, position: int) -> int:
        """How many rows from a position on can be told at once: to the end of its period, or of the last set."""
        phase = self._phase(position)[1]
        place = position - phase.begin
        period = PERIOD - place % PERIOD
        return period if phase.length is None else min(period, phase.length - place)

    def draws(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [count] each: the set at every position, and the position in that set's own order."""
        sets, numbers = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            number, phase = self._phase(first + done)
            place = first + done - phase.begin
            period, within = divmod(place, PERIOD)
            part = min(count - done, PERIOD - within, phase.length - place if phase.length is not None else count)
            pattern = self._pattern(number, phase.counts, period)
            for which, per_period in enumerate(phase.counts):
                places = np.flatnonzero(pattern == which)
                inside = (places >= within) & (places < within + part)
                sets[done + places[inside] - within] = which
                numbers[done + places[inside] - within] = phase.drawn[which] + period * per_period + np.flatnonzero(inside)
            done += part
        return sets, numbers

    def position(self, which: int, number: int) -> int | None:
        """Where row `number` of a set's own order stands in the mixture; None where it is never drawn."""
        for place, phase in enumerate(self.phases):
            if not phase.counts[which] or number < phase.drawn[which]:
                continue
            position = self._place_of(place, list(phase.counts), which, number - phase.drawn[which] + 1)
            if phase.length is None or position < phase.length:
                return phase.begin + position
        return None

    def shards_from(self, position: int) -> dict[int, Iterator[int]]:
        """For every set, its shards in the order in which they are needed from a position on."""
        number, phase = self._phase(position)
        taken = self._drawn_until(number, list(phase.counts), position - phase.begin)
        return {
            which: self.orders[which].shards_from(phase.drawn[which] + taken[which])
            for which, per_period in enumerate(phase.counts) if per_period
        }

    def _phase(self, position: int) -> tuple[int, Phase]:
        for number, phase in enumerate(self.phases):
            if phase.length is None or position < phase.begin + phase.length:
                return number, phase
        raise IndexError(f"the sets are used up after {self.total_rows} rows")

    def _pattern(self, phase: int, counts: tuple[int, ...] | list[int], period: int) -> np.ndarray:
        """int64 [PERIOD]: the set at each place of a period."""
        places = permute(np.arange(PERIOD), num_rows=PERIOD, key=("mixture", self.seed, phase, period))
        return np.repeat(np.arange(len(counts)), counts)[places]

    def _place_of(self, phase: int, counts: list[int], which: int, nth: int) -> int:
        """Place in a phase of the `nth` row, from 1, of a set."""
        period, rest = divmod(nth - 1, counts[which])
        return period * PERIOD + int(np.flatnonzero(self._pattern(phase, counts, period) == which)[rest])

    def _drawn_until(self, phase: int, counts: list[int], place: int) -> list[int]:
        """Rows of each set in the first `place` positions of a phase."""
        period, within = divmod(place, PERIOD)
        seen = np.bincount(self._pattern(phase, counts, period)[:within], minlength=len(counts))
        return [period * per_period + int(part) for per_period, part in zip(counts, seen, strict=True)]


@dataclass(frozen=True)
class MixedTable:
    """The rows of several sets, with the interface of `RowTable`; shards are numbered over all of them.

    Attributes:
        tables: of each set.
        shares: of each set.
    """

    tables: list[RowTable]
    shares: list[Share]

    @cached_property
    def first_shards(self) -> list[int]:
        """Number of each set's first shard."""
        return np.cumsum([0, *(table.num_shards for table in self.tables)])[:-1].tolist()

    @property
    def sequence_length(self) -> int:
        """Tokens of a row."""
        return self.tables[0].sequence_length

    @property
    def vocab_size(self) -> int:
        """Largest token id that the tokenizer can give, plus one."""
        return max(table.vocab_size for table in self.tables)

    @property
    def pad_token_id(self) -> int:
        """What stands where nothing is."""
        return self.tables[0].pad_token_id

    @property
    def is_whole(self) -> bool:
        """Whether all shards are there."""
        return True

    @property
    def num_rows(self) -> int:
        """Rows of all sets."""
        return sum(table.num_rows for table in self.tables)

    @property
    def filled_share(self) -> float:
        """Share of positions that hold a token of a document, each set once."""
        return sum(table.filled_share * table.num_rows for table in self.tables) / max(1, self.num_rows)

    @property
    def fingerprint(self) -> str:
        """Of every set and its part; what a cursor means, besides the seed."""
        parts = [f"{table.fingerprint} {share.weight!r} {share.max_epochs!r}" for table, share in zip(self.tables, self.shares, strict=True)]
        return files.digest_text("mixture", *parts)

    def order(self, *, seed: int, window_shards: int) -> Mixture:
        """The order in which a run trains on these rows; each set is shuffled by a seed of its own."""
        orders = [table.order(seed=seed + number, window_shards=window_shards) for number, table in enumerate(self.tables)]
        return Mixture(orders, [table.num_rows for table in self.tables], self.shares, self.first_shards, seed)

    def set_of(self, shard: int) -> int:
        """Which set a shard belongs to."""
        return bisect_right(self.first_shards, shard) - 1

    def shard(self, number: int) -> OpenShard:
        """A shard, opened."""
        which = self.set_of(number)
        return self.tables[which].shard(number - self.first_shards[which])

    def trained_tokens(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n]: how many labels of each row are trained."""
        shards, rows = shard_and_row(ids)
        owners = np.searchsorted(self.first_shards, shards, side="right") - 1
        found = np.empty(len(ids), np.int64)
        for which in np.unique(owners).tolist():
            chosen = owners == which
            found[chosen] = self.tables[which].trained_tokens(row_ids(shards[chosen] - self.first_shards[which], rows[chosen]))
        return found

    def look_ahead(self, order: Mixture, position: int) -> None:
        """Have the shards of every set fetched that are needed from a position on."""
        if any(table.store.is_remote for table in self.tables):
            for which, shards in order.shards_from(position).items():
                self.tables[which].prefetch(shards, count=2 * order.orders[which].window_shards)

    @property
    def may_wait(self) -> bool:
        """Whether rows of any set may have to be waited for."""
        return any(table.may_wait for table in self.tables)

    def heed(self, given_up: Callable[[], bool]) -> None:
        """Let a wait for a shard end with a Failure when `given_up` says so."""
        for table in self.tables:
            table.heed(given_up)

    def close(self) -> None:
        """Let go of all shards."""
        for table in self.tables:
            table.close()
