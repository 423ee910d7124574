"""Rows that are left out of the order of training for good: where the next trained row is, and which positions a batch has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Passed:
    """Stretches of positions that are passed over; a cursor counts them as consumed.

    Attributes:
        ranges: (first, last + 1), ascending and apart.
    """

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[Iterable[int]]) -> Passed:
        """From any ranges, which may touch and overlap."""
        joined: list[list[int]] = []
        for first, stop in sorted(tuple(pair) for pair in ranges):
            if joined and first <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], stop)
            elif first < stop:
                joined.append([first, stop])
        return cls(tuple((first, stop) for first, stop in joined))

    def and_(self, first: int, stop: int) -> Passed:
        """With one more range."""
        return Passed.of([*self.ranges, (first, stop)])

    def jump(self, position: int) -> int:
        """The first position from here on that is trained."""
        return next((stop for first, stop in self.ranges if first <= position < stop), position)

    def covers(self, position: int) -> bool:
        """Whether a position is passed over."""
        return self.jump(position) != position

    def spans(self, position: int, count: int) -> list[tuple[int, int]]:
        """The next `count` trained positions, as (first, number) of each stretch; at least one stretch."""
        found = []
        while True:
            position = self.jump(position)
            next_gap = next((first for first, _ in self.ranges if first > position), position + count)
            part = min(count, next_gap - position)
            found.append((position, part))
            position, count = position + part, count - part
            if count <= 0:
                return found

    def trained(self, first: int, stop: int) -> int:
        """How many of the positions from `first` up to `stop` are trained."""
        return max(0, stop - first) - sum(max(0, min(stop, end) - max(first, begin)) for begin, end in self.ranges)

    def rows(self, order: Any, first: int, count: int, *, begin: int) -> np.ndarray:
        """int64 [count]: the row ids of the next trained positions.

        Args:
            order: an `Order` or a `Mixture`.
            first: the cursor.
            count: number of rows.
            begin: rows that were consumed before this order began.
        """
        parts = [order.rows(position - begin, part) for position, part in self.spans(first, count) if part]
        return np.concatenate([np.zeros(0, np.int64), *parts])
