"""What all ranks decide together, from one small reduction a step that nobody waits for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from harness import distributed
from harness.errors import Failure, HarnessError, Refused


FAILED = 2.0**24
"""What a rank that failed adds to the number of ranks that were asked to stop."""

WRITING = 2.0**24
"""What a rank that still writes its part of a checkpoint adds to the number of ranks that were asked to save."""

TRACE = 2.0**24
"""What a rank that was asked for a trace adds to the number of ranks on the first stage of a pipeline."""


def fail_together(error: HarnessError | None) -> NoReturn:
    """End all ranks with the message of the first that failed, so that rank 0 can say it. Collective.

    Raises:
        Refused: when the user can mend it.
        Failure: otherwise.
    """
    told = distributed.gather_objects((isinstance(error, Refused), str(error)) if error else None)
    refused, text = next(found for found in told if found)
    raise Refused(text) if refused else Failure(text)


@dataclass(frozen=True)
class Agreed:
    """Sums over all ranks for one step.

    Attributes:
        stop: a rank was asked to stop.
        save: a rank was asked to save.
        failed: a rank had no rows for this step, which must be forgotten.
        writing: a rank still wrote its part of a checkpoint.
        loss_sum: sum of token losses; not a number when a rank's was not finite.
        aux_loss: mean of the auxiliary losses.
        idle_share: part of the step in which the mean rank of a pipeline waited for others; None where there is none.
        trace: a rank was asked for a trace.
    """

    stop: bool
    save: bool
    failed: bool
    writing: bool
    loss_sum: float
    aux_loss: float
    idle_share: float | None = None
    trace: bool = False


class Agreement:
    """One reduction of 64 bytes a step, read at the next boundary.

    Args:
        device: where the engine computes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._pending: tuple[torch.Tensor, Any] | None = None

    def offer(
        self, loss_sum: torch.Tensor, aux_sum: torch.Tensor, *, stop: bool, save: bool, failed: bool = False, writing: bool = False,
        busy_s: float = 0.0, window_s: float = 0.0, trace: bool = False,
    ) -> None:
        """Start the reduction of this step; the one before must have been collected.

        Args:
            loss_sum: this rank's sum of token losses, a float64 scalar.
            aux_sum: its auxiliary losses.
            stop: whether it was asked to stop.
            save: whether it was asked to save.
            failed: whether it could not read its rows.
            writing: whether it still writes a checkpoint.
            busy_s: seconds that it worked in a pipeline.
            window_s: on the first stage, seconds that the pipeline ran.
            trace: whether it was asked for a trace.
        """
        assert self._pending is None, "collect() first"
        asked = [float(stop) + FAILED * failed, float(save) + WRITING * writing]
        own = torch.tensor([*asked, busy_s, window_s, float(window_s > 0.0) + TRACE * trace], dtype=torch.float64).to(self.device, non_blocking=True)
        broken = (~torch.isfinite(loss_sum)).double()
        packed = torch.cat([own, torch.stack([torch.nan_to_num(loss_sum, nan=0.0, posinf=0.0, neginf=0.0), aux_sum, broken])])
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
        stop, save, busy, window, num_windows, loss_sum, aux, broken = packed.tolist()
        idle_share = 1.0 - (busy / distributed.size()) / (window / (num_windows % TRACE)) if window else None
        loss_sum = loss_sum if not broken else float("nan")
        return Agreed(stop % FAILED > 0, save % WRITING > 0, stop >= FAILED, save >= WRITING, loss_sum, aux, idle_share, num_windows >= TRACE)
