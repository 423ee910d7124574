"""A numpy memory map, a stored permutation and a gather: the least that a loader of fixed rows can do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from protocol import BATCH, Reader, Request, serve


def convert(rows: Path, folder: Path) -> None:
    """Copy the rows."""
    shutil.copyfile(rows, folder / "rows.npy")


class MemoryMap(Reader):
    """Resumes at a row number of a permutation that is made anew; `--workers` means nothing to it."""

    def __init__(self, request: Request):
        self.rows = np.load(request.folder / "rows.npy", mmap_mode="r")
        self.order = np.random.default_rng(request.seed).permutation(len(self.rows))
        self.row = request.state or 0

    def batches(self) -> Iterator[np.ndarray]:
        while self.row < len(self.rows):
            chosen = self.order[self.row : self.row + BATCH]
            self.row += len(chosen)
            yield self.rows[chosen].astype(np.int64)

    def state(self) -> int:
        return self.row


if __name__ == "__main__":
    serve(convert, MemoryMap, versions=("numpy",))
