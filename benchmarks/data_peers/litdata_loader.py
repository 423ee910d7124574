"""litdata: chunks of tokens read by its TokensLoader, resumed by the state of its StreamingDataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize
from protocol import BATCH, LENGTH, Reader, Request, serve

CHUNK_ROWS = 8192


def _row(rows: Path, number: int) -> torch.Tensor:
    return torch.from_numpy(np.array(np.load(rows, mmap_mode="r")[number]))


def convert(rows: Path, folder: Path) -> None:
    """Chunks of whole rows; counted afterwards, since litdata says nothing when the processes that write have died."""
    number = len(np.load(rows, mmap_mode="r"))
    optimize(fn=partial(_row, rows), inputs=list(range(number)), output_dir=str(folder), chunk_size=CHUNK_ROWS * LENGTH,
             item_loader=TokensLoader(), num_workers=1, verbose=False)
    if (written := len(StreamingDataset(str(folder), item_loader=TokensLoader(block_size=LENGTH)))) != number:
        raise ValueError(f"{written} of {number} rows were written")


def _stack(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(rows).to(torch.int64)


class Chunks(Reader):
    """All data is local."""

    def __init__(self, request: Request):
        data = StreamingDataset(str(request.folder), item_loader=TokensLoader(block_size=LENGTH), shuffle=True, seed=request.seed)
        self.loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=request.workers, collate_fn=_stack)
        if request.state is not None:
            self.loader.load_state_dict(request.state)

    def batches(self) -> Iterator[torch.Tensor]:
        yield from self.loader

    def state(self) -> Any:
        return self.loader.state_dict()


if __name__ == "__main__":
    serve(convert, Chunks, versions=("litdata", "torch", "numpy"))
