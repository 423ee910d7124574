"""`datasets`, iterable: shards in a shuffled order and a shuffle buffer, resumed by its own `state_dict`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import load_from_disk
from datasets_map import convert
from protocol import BATCH, Reader, Request, serve
from torch.utils.data import DataLoader

SHARDS, BUFFER_ROWS = 16, 1000


class Iterable(Reader):
    """`IterableDataset.state_dict` does not hold the rows in the shuffle buffer; its documentation says that they are lost."""

    def __init__(self, request: Request):
        if request.workers and request.state is not None:
            raise ValueError("the state of worker processes needs another package's loader")
        rows = load_from_disk(request.folder).to_iterable_dataset(num_shards=SHARDS).with_format("torch")
        self.data = rows.shuffle(seed=request.seed, buffer_size=BUFFER_ROWS).batch(BATCH)
        if request.state is not None:
            self.data.load_state_dict(request.state)
        self.loader: DataLoader[Any] | Any = DataLoader(self.data, batch_size=None, num_workers=request.workers) if request.workers else self.data

    def batches(self) -> Iterator[torch.Tensor]:
        for batch in self.loader:
            yield batch["input_ids"]

    def state(self) -> Any:
        return self.data.state_dict()


if __name__ == "__main__":
    serve(convert, Iterable, versions=("datasets", "torch", "numpy"))
