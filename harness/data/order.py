"""The order of training rows: a keyed permutation of each epoch, computed where it is needed and stored nowhere."""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 6


def row_ids(first: int, count: int, *, num_rows: int, seed: int) -> np.ndarray:
    """The rows at positions `first` to `first + count` of the endless sequence of epochs.

    Args:
        first: position; position p lies in epoch p // num_rows.
        count: how many.
        num_rows: rows of an epoch.
        seed: seed of the run.

    Returns:
        int64 array [count] of row numbers.
    """
    positions = np.arange(first, first + count, dtype=np.int64)
    epochs, places = positions // num_rows, positions % num_rows
    rows = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = permute(places[chosen], num_rows=num_rows, key=(seed, int(epoch)))
    return rows


def permute(places: np.ndarray, *, num_rows: int, key: tuple[int, int]) -> np.ndarray:
    """A permutation of 0 .. num_rows-1 at `places`: a Feistel network on the next even power of two, walked until inside.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), cycle walking.
    """
    half = max(1, (max(2, num_rows) - 1).bit_length() + 1 >> 1)
    keys = _round_keys(key)
    result = _feistel(places.astype(np.uint64), half, keys)
    while (outside := result >= num_rows).any():
        result[outside] = _feistel(result[outside], half, keys)
    return result.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: list[int]) -> np.ndarray:
    mask = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ np.uint64(key)) & mask)
    return (left << np.uint64(half)) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _round_keys(key: tuple[int, int]) -> list[int]:
    digest = hashlib.blake2b(f"{key[0]}:{key[1]}".encode(), digest_size=8 * ROUNDS).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]
