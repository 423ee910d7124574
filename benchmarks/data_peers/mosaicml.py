"""mosaicml-streaming: MDS shards of arrays, resumed by the state of its StreamingDataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import BATCH, Reader, Request, serve
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset


def convert(rows: Path, folder: Path) -> None:
    """MDS shards."""
    held = np.load(rows, mmap_mode="r")
    with MDSWriter(out=str(folder), columns={"input_ids": "ndarray:uint16"}) as writer:
        for row in held:
            writer.write({"input_ids": np.asarray(row)})
    if (written := StreamingDataset(local=str(folder), batch_size=BATCH).num_samples) != len(held):
        raise ValueError(f"{written} of {len(held)} rows were written")


def _stack(samples: list[dict[str, np.ndarray]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([sample["input_ids"] for sample in samples]).astype(np.int64))


class Streaming(Reader):
    """All data is local; the shuffle is the default one."""

    def __init__(self, request: Request):
        data = StreamingDataset(local=str(request.folder), batch_size=BATCH, shuffle=True, shuffle_seed=request.seed)
        self.loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=request.workers, collate_fn=_stack)
        if request.state is not None:
            self.loader.load_state_dict(request.state)

    def batches(self) -> Iterator[torch.Tensor]:
        yield from self.loader

    def state(self) -> Any:
        return self.loader.state_dict()


if __name__ == "__main__":
    serve(convert, Streaming, versions=("mosaicml-streaming", "torch", "numpy"))
