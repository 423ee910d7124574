"""The words of a checkpoint's slices: what a rank holds of a parameter, and in which optimizer tensor it lies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from harness.errors import Failure


@dataclass(frozen=True)
class Slice:
    """Part of a parameter: `length` elements from `offset` of the flattened parameter, whose full shape is `shape`."""

    name: str
    offset: int
    length: int
    shape: tuple[int, ...]


@dataclass
class SliceGroup:
    """Slices that are in memory together.

    Attributes:
        slices: what the group holds.
        tensors: kind (`master`, `exp_avg`, `exp_avg_sq`) -> parameter name -> 1-D fp32 CPU tensor of the slice, unless it was asked for where it is.
            They may be views of the optimizer's own memory: use them before asking for the next group.
        adam_step: Adam's step count.
    """

    slices: list[Slice]
    tensors: dict[str, dict[str, torch.Tensor]]
    adam_step: int = 0


@dataclass(frozen=True)
class Piece:
    """A slice, and the element of a holding's flat tensor at which it starts.

    Attributes:
        copy: another pipeline stage owns the tied parameter and writes it; this one only reads it.
    """

    slice: Slice
    start: int
    copy: bool = False


class Holding:
    """One tensor that the base optimizer updates, and the pieces of parameters that lie in it.

    Args:
        base: the optimizer that owns the moments.
        tensor: the fp32 master, the key into `base.state`.
        pieces: what lies where in it.
    """

    def __init__(self, base: torch.optim.Optimizer, tensor: torch.Tensor, pieces: list[Piece]):
        self.base, self.tensor, self.pieces = base, tensor, pieces

    @property
    def group(self) -> dict[str, Any]:
        """The group of the base optimizer that the tensor is updated with."""
        return next(group for group in self.base.param_groups if any(held is self.tensor for held in group["params"]))

    @contextmanager
    def open(self, *, write: bool) -> Iterator[None]:
        """Bring master and moments into memory; with `write` they are put back afterwards."""
        yield

    def refresh(self) -> None:
        """After the master was written, inside `open`: carry it into the model's own weights, where that is local."""


@dataclass
class Family:
    """All holdings of a rank under one of DeepSpeed's optimizers.

    Attributes:
        holdings: in a fixed order.
        writes: False where another rank holds the same and writes it.
    """

    holdings: list[Holding] = field(default_factory=list)
    writes: bool = True

    def windows(self) -> Iterator[list[Holding]]:
        """The holdings in portions that may be in memory together."""
        yield self.holdings

    def begin_load(self) -> None:
        """Before the first holding is written."""

    def end_load(self) -> None:
        """After the last one: what is left of the model's weights, collectively."""


def parameter_names(model: torch.nn.Module) -> dict[int, str]:
    """Identity of each parameter -> its name, tied ones once."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def require_names(thing: object, names: tuple[str, ...]) -> None:
    """Fail when DeepSpeed no longer has the private names that slices rest on.

    Raises:
        Failure: with the names that are missing and the version of DeepSpeed.
    """
    missing = [name for name in names if not hasattr(thing, name)]
    if missing:
        import deepspeed

        raise Failure(
            f"DeepSpeed {deepspeed.__version__} has no {', '.join(missing)} in {type(thing).__name__}: "
            "checkpoints of this harness rest on them and were proved with DeepSpeed 0.19.8."
        )
