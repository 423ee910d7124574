"""`datasets`, map-style: a list of row numbers a batch through torch's DataLoader, the cheapest way to read it in a random order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value, load_from_disk
from protocol import BATCH, LENGTH, Reader, Request, serve
from torch.utils.data import DataLoader

PORTION_ROWS = 8192


def convert(rows: Path, folder: Path) -> None:
    """An Arrow dataset of lists of fixed length."""
    held = np.load(rows, mmap_mode="r")
    features = Features({"input_ids": List(Value("uint16"), length=LENGTH)})
    portions = (np.asarray(held[first : first + PORTION_ROWS]).reshape(-1) for first in range(0, len(held), PORTION_ROWS))
    columns = [pa.FixedSizeListArray.from_arrays(pa.array(portion), LENGTH) for portion in portions]
    Dataset(pa.Table.from_arrays([pa.chunked_array(columns)], names=["input_ids"]).cast(features.arrow_schema)).save_to_disk(folder)


class MapStyle(Reader):
    """Resumes as Trainer does: the sampler leaves out the batches that were seen."""

    def __init__(self, request: Request):
        data = load_from_disk(request.folder).with_format("torch")
        self.row = request.state or 0
        order = np.random.default_rng(request.seed).permutation(len(data))[self.row :]
        sampler = [order[first : first + BATCH].tolist() for first in range(0, len(order), BATCH)]
        self.loader: DataLoader[Any] = DataLoader(data, sampler=sampler, batch_size=None, num_workers=request.workers)

    def batches(self) -> Iterator[torch.Tensor]:
        for batch in self.loader:
            self.row += len(batch["input_ids"])
            yield batch["input_ids"]

    def state(self) -> int:
        return self.row


if __name__ == "__main__":
    serve(convert, MapStyle, versions=("datasets", "torch", "numpy"))
