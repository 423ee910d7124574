"""The order of training rows: keyed permutations, computed where they are needed and stored nowhere.

An epoch goes through the shards in a permuted order, a window of them at a time, and through the rows of a window in a
permuted order of their own, so that a set that is far away is needed a few shards at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

ROUNDS = 6
SHIFT = 32
ROW_MASK = (1 << SHIFT) - 1
VERSION = 2
"""Of the order of several shards; a run that began under another one is refused, for its cursor would mean other rows."""


def row_ids(shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """int64: what identifies rows of a set: the shard in the upper half, the row in it in the lower."""
    return np.asarray(shards, np.int64) << SHIFT | np.asarray(rows, np.int64)


def shard_and_row(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shards, and the rows in them, of `row_ids`."""
    return ids >> SHIFT, ids & ROW_MASK


class _Epoch:
    """One epoch: its shards in order and, as far as they were needed, the positions at which shards and windows end."""

    def __init__(self, shards: np.ndarray):
        self.shards = shards
        self.ends: list[int] = []
        self.window_ends: list[int] = []

    @property
    def reached(self) -> int:
        """Rows of the windows that are known."""
        return self.window_ends[-1] if self.window_ends else 0


@dataclass(frozen=True)
class Order:
    """The endless sequence of epochs; a pure function of these values.

    Args:
        num_shards: of the set.
        rows_in: how many rows a shard holds; asked for as late as possible, since a shard may not be there yet.
        seed: of the run.
        window_shards: shards whose rows are shuffled together.
    """

    num_shards: int
    rows_in: Callable[[int], int]
    seed: int
    window_shards: int
    _epochs: dict[int, _Epoch] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_rows(self) -> int:
        """Rows of an epoch; asks for all shards."""
        return self._reach(0, None).reached

    def rows(self, first: int, count: int) -> np.ndarray:
        """int64 [count]: the `row_ids` at positions `first` to `first + count`."""
        found = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, place = self._epoch_of(first + done)
            order = self._reach(epoch, place + count - done)
            part = min(count - done, order.reached - place)
            found[done : done + part] = self._rows_of_epoch(epoch, np.arange(place, place + part))
            done += part
        return found

    def position(self, shard: int, row: int, *, epoch: int) -> int:
        """The position at which a row stands in an epoch: the inverse of `rows`."""
        order = self._reach(epoch, None)
        turn = int(np.flatnonzero(order.shards == shard)[0])
        window = turn // self.window_shards
        begin, size = self._window(order, window)
        inside = order.ends[turn] - self.rows_in(shard) - begin + row
        place = unpermute(np.asarray([inside]), num_rows=size, key=self._key(epoch, window))[0]
        return epoch * order.reached + begin + int(place)

    def ahead(self, position: int) -> int:
        """How many rows from a position on can be told without asking for another window of shards."""
        epoch, place = self._epoch_of(position)
        order = self._reach(epoch, place + 1)
        return order.window_ends[int(np.searchsorted(order.window_ends, place, side="right"))] - place

    def shards_from(self, position: int) -> Iterator[int]:
        """The shards in the order in which they are needed from a position on, a window at a time, without end."""
        epoch, place = self._epoch_of(position)
        window = int(np.searchsorted(self._reach(epoch, place + 1).window_ends, place, side="right"))
        while True:
            yield from self._shards(epoch)[window * self.window_shards :].tolist()
            epoch, window = epoch + 1, 0

    def _epoch_of(self, position: int) -> tuple[int, int]:
        """Epoch of a position, and its place in it; positions of the first epoch do not need the rows of all shards."""
        if position < self._reach(0, position + 1).reached:
            return 0, position
        return divmod(position, self.num_rows)

    def _rows_of_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        order = self._epoch(epoch)
        rows = np.empty(len(places), dtype=np.int64)
        windows = np.searchsorted(order.window_ends, places, side="right")
        ends = np.asarray(order.ends)
        for window in np.unique(windows):
            chosen = windows == window
            begin, size = self._window(order, int(window))
            inside = begin + permute(places[chosen] - begin, num_rows=size, key=self._key(epoch, int(window)))
            turn = np.searchsorted(ends, inside, side="right")
            before = np.where(turn > 0, ends[turn - 1], 0)
            rows[chosen] = row_ids(order.shards[turn], inside - before)
        return rows

    def _shards(self, epoch: int) -> np.ndarray:
        return shards_of_epoch(self.num_shards, seed=self.seed, epoch=epoch)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            for stale in [kept for kept in self._epochs if kept not in (0, epoch - 1)]:
                del self._epochs[stale]
            self._epochs[epoch] = _Epoch(self._shards(epoch))
        return self._epochs[epoch]

    def _reach(self, epoch: int, place: int | None) -> _Epoch:
        """The epoch with all windows up to `place` known, or all of them."""
        order = self._epoch(epoch)
        while len(order.ends) < self.num_shards and (place is None or order.reached < place):
            end = order.reached
            for shard in order.shards[len(order.ends) : len(order.ends) + self.window_shards].tolist():
                end += self.rows_in(shard)
                order.ends.append(end)
            order.window_ends.append(end)
        return order

    def _window(self, order: _Epoch, window: int) -> tuple[int, int]:
        begin = order.window_ends[window - 1] if window else 0
        return begin, order.window_ends[window] - begin

    def _key(self, epoch: int, window: int) -> tuple[int, int]:
        """Seed, and the number of the window in the endless sequence."""
        return self.seed, epoch * -(-self.num_shards // self.window_shards) + window


def shards_of_epoch(num_shards: int, *, seed: int, epoch: int) -> np.ndarray:
    """int64 [num_shards]: the shards in the order of an epoch."""
    return permute(np.arange(num_shards), num_rows=num_shards, key=("shards", seed, epoch))


def permute(places: np.ndarray, *, num_rows: int, key: tuple[object, ...]) -> np.ndarray:
    """A permutation of 0 .. num_rows-1 at `places`: a Feistel network on the next even power of two, walked until inside.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), cycle walking.
    """
    return _walk(places, num_rows, _round_keys(key), _feistel)


def unpermute(rows: np.ndarray, *, num_rows: int, key: tuple[object, ...]) -> np.ndarray:
    """The places at which `permute` gives `rows`."""
    return _walk(rows, num_rows, _round_keys(key), _feistel_back)


def _walk(values: np.ndarray, num_rows: int, keys: list[int], step: Callable[[np.ndarray, int, list[int]], np.ndarray]) -> np.ndarray:
    half = max(1, (max(2, num_rows) - 1).bit_length() + 1 >> 1)
    result = step(values.astype(np.uint64), half, keys)
    while (outside := result >= num_rows).any():
        result[outside] = step(result[outside], half, keys)
    return result.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: list[int]) -> np.ndarray:
    mask = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ np.uint64(key)) & mask)
    return (left << np.uint64(half)) | right


def _feistel_back(values: np.ndarray, half: int, keys: list[int]) -> np.ndarray:
    mask = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & mask
    for key in reversed(keys):
        left, right = right ^ (_mix(left ^ np.uint64(key)) & mask), left
    return (left << np.uint64(half)) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _round_keys(key: tuple[object, ...]) -> list[int]:
    digest = hashlib.blake2b(":".join(map(str, key)).encode(), digest_size=8 * ROUNDS).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]
