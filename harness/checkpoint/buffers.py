"""What a model keeps beside its parameters: its persistent buffers, such as the bias of a router, in a file of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from harness.formats.manifest import BUFFERS, SliceFile
from harness.formats.tensor_file import TensorEntry, write_tensors

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}


def entries(buffers: Mapping[str, torch.Tensor]) -> list[TensorEntry]:
    """As they stand in a file, each in its own type."""
    return [TensorEntry(name, CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in buffers.items()]


def content(buffer: torch.Tensor) -> memoryview:
    """Its bytes."""
    return memoryview(buffer.contiguous().reshape(-1).view(torch.uint8).numpy()) if buffer.numel() else memoryview(b"")


def write(folder: Path, buffers: Mapping[str, torch.Tensor]) -> SliceFile:
    """Write those of a model, which are in host memory."""
    num_bytes, digest = write_tensors(folder / BUFFERS, entries(buffers), map(content, buffers.values()))
    return SliceFile(file=BUFFERS, bytes=num_bytes, digest=digest, slices=())
