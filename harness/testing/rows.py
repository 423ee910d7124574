"""Random packed rows with very uneven trained spans, cut into micro-batches as a loader would."""

from __future__ import annotations

import numpy as np

from harness.data.loader import UNTRAINED, Batch, GlobalBatch


def random_rows(step: int, *, rows: int, length: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of two pieces each, with spans from 1 token to nearly all.

    Returns:
        input_ids, position_ids, labels: int64 [rows, length].
    """
    random = np.random.default_rng(1000 + step)
    ids = random.integers(0, vocabulary, (rows, length))
    positions, labels = np.zeros_like(ids), np.full_like(ids, UNTRAINED)
    for row in range(rows):
        border = int(random.integers(3, length - 3))
        positions[row, :border], positions[row, border:] = np.arange(border), np.arange(length - border)
        for start, stop in ((0, border), (border, length)):
            first = int(random.integers(start + 1, stop))
            labels[row, first:stop] = ids[row, first:stop]
    return ids, positions, labels


def cut(rows: tuple[np.ndarray, np.ndarray, np.ndarray], *, micro_batch: int, rank: int, ranks: int) -> GlobalBatch:
    """This rank's micro-batches of a global batch."""
    ids, positions, labels = rows
    firsts = [(slot * ranks + rank) * micro_batch for slot in range(len(ids) // (micro_batch * ranks))]
    micro = [Batch.of(ids[f : f + micro_batch], positions[f : f + micro_batch], labels[f : f + micro_batch], f) for f in firsts]
    return GlobalBatch(micro, int((labels != UNTRAINED).sum()), len(ids), 0, len(ids))
