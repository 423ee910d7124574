"""What every engine gives back from a step, and the randomness that belongs to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.model.build import derive_seed


@dataclass
class StepResult:
    """One optimizer step.

    Attributes:
        loss_sum: float64 scalar tensor on the CPU or the device: this rank's sum of token losses.
        aux_loss_sum: this rank's sum of auxiliary losses, one mean a micro-batch; 0 for most models.
        trained_tokens: trained tokens of the whole global batch.
        grad_norm: gradient norm before clipping, over all ranks.
        applied: False when the step was skipped because a gradient was not finite.
    """

    loss_sum: torch.Tensor
    aux_loss_sum: torch.Tensor
    trained_tokens: int
    grad_norm: float
    applied: bool


def seed_micro_batch(seed: int, *, step: int, first_row: int, stage: int = 0, purpose: str = "train") -> None:
    """Seed every generator from what identifies a micro-batch, so that randomness has no state to save.

    Args:
        seed: seed of the run.
        step: optimizer step.
        first_row: index of the micro-batch's first row in the global batch.
        stage: pipeline stage.
        purpose: what the numbers are for.
    """
    torch.manual_seed(derive_seed(seed, purpose, step, first_row, stage))
