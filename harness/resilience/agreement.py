"""What all ranks decide together, from one small reduction a step that nobody waits for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from harness import distributed


@dataclass(frozen=True)
class Agreed:
    """Sums over all ranks for one step.

    Attributes:
        stop: a rank was asked to stop.
        save: a rank was asked to save.
        loss_sum: sum of token losses.
        aux_loss: mean of the auxiliary losses.
        finite: every rank's loss was finite.
    """

    stop: bool
    save: bool
    loss_sum: float
    aux_loss: float
    finite: bool


class Agreement:
    """One reduction of 40 bytes a step, read at the next boundary.

    Args:
        device: where the engine computes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._pending: tuple[torch.Tensor, Any] | None = None

    def offer(self, loss_sum: torch.Tensor, aux_sum: torch.Tensor, *, stop: bool, save: bool) -> None:
        """Start the reduction of this step; the one before must have been collected."""
        assert self._pending is None, "collect() first"
        flags = torch.tensor([float(stop), float(save)], dtype=torch.float64).to(self.device, non_blocking=True)
        broken = (~torch.isfinite(loss_sum)).double()
        packed = torch.cat([flags, torch.stack([torch.nan_to_num(loss_sum, nan=0.0, posinf=0.0, neginf=0.0), aux_sum, broken])])
        handle = distributed.all_reduce_sum(packed, wait=False)
        self._pending = (packed, handle)

    def collect(self) -> Agreed | None:
        """The outcome of the last offer, or None when there is none."""
        if self._pending is None:
            return None
        packed, handle = self._pending
        self._pending = None
        if handle is not None:
            handle.wait()
        stop, save, loss_sum, aux, broken = packed.tolist()
        return Agreed(stop > 0, save > 0, loss_sum if not broken else float("nan"), aux, not broken)
