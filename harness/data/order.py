"""The order of training rows: keyed permutations, computed where they are needed and stored nowhere.

An epoch goes through the shards in a permuted order, a window of them at a time, and through the rows of a window in a
permuted order of their own, so that a set that is far away is needed a few shards at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

ROUNDS = 6
VERSION = 2
"""Of the order of several shards; a run that began under another one is refused, for its cursor would mean other rows."""


@dataclass(frozen=True)
class _Epoch:
    """One epoch: its shards in order, cut into windows.

    Attributes:
        shards: int64 [num_shards]: in the order of the epoch.
        ends: int64 [num_shards]: positions at which each of them, taken whole, ends.
        window_ends: int64 [num_windows]: positions at which the windows end.
    """

    shards: np.ndarray
    ends: np.ndarray
    window_ends: np.ndarray


@dataclass(frozen=True)
class Order:
    """The endless sequence of epochs; a pure function of these values.

    Args:
        rows_by_shard: int64 [num_shards]: rows of each shard; rows are numbered shard after shard.
        seed: of the run.
        window_shards: shards whose rows are shuffled together.
    """

    rows_by_shard: np.ndarray
    seed: int
    window_shards: int
    _epochs: dict[int, _Epoch] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return int(self.rows_by_shard.sum())

    def rows(self, first: int, count: int) -> np.ndarray:
        """int64 [count]: the rows at positions `first` to `first + count`; position p lies in epoch p // num_rows."""
        positions = np.arange(first, first + count, dtype=np.int64)
        epochs, places = positions // self.num_rows, positions % self.num_rows
        rows = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = self._rows_of_epoch(int(epoch), places[chosen])
        return rows

    def position(self, row: int, *, epoch: int) -> int:
        """The position at which `row` stands in an epoch: the inverse of `rows`."""
        order, starts = self._epoch(epoch), self._starts()
        shard = int(np.searchsorted(starts, row, side="right")) - 1
        turn = int(np.flatnonzero(order.shards == shard)[0])
        window = turn // self.window_shards
        begin, size = self._window(order, window)
        before = int(order.ends[turn] - self.rows_by_shard[shard]) - begin
        place = unpermute(np.asarray([before + row - starts[shard]]), num_rows=size, key=self._key(order, epoch, window))[0]
        return epoch * self.num_rows + begin + int(place)

    def _rows_of_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        order, starts = self._epoch(epoch), self._starts()
        rows = np.empty(len(places), dtype=np.int64)
        windows = np.searchsorted(order.window_ends, places, side="right")
        for window in np.unique(windows):
            chosen = windows == window
            begin, size = self._window(order, int(window))
            inside = begin + permute(places[chosen] - begin, num_rows=size, key=self._key(order, epoch, int(window)))
            turn = np.searchsorted(order.ends, inside, side="right")
            shard = order.shards[turn]
            rows[chosen] = starts[shard] + inside - (order.ends[turn] - self.rows_by_shard[shard])
        return rows

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            count = len(self.rows_by_shard)
            shards = permute(np.arange(count), num_rows=count, key=("shards", self.seed, epoch))
            ends = np.cumsum(self.rows_by_shard[shards])
            last = np.minimum(np.arange(0, count, self.window_shards) + self.window_shards, count) - 1
            self._epochs.clear()
            self._epochs[epoch] = _Epoch(shards, ends, ends[last])
        return self._epochs[epoch]

    def _starts(self) -> np.ndarray:
        return np.cumsum(self.rows_by_shard) - self.rows_by_shard

    def _window(self, order: _Epoch, window: int) -> tuple[int, int]:
        begin = int(order.window_ends[window - 1]) if window else 0
        return begin, int(order.window_ends[window]) - begin

    def _key(self, order: _Epoch, epoch: int, window: int) -> tuple[int, int]:
        """Seed, and the number of the window in the endless sequence."""
        return self.seed, epoch * len(order.window_ends) + window


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
