"""What every engine gives back from a step, and the randomness that belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from harness.data.loader import UNTRAINED
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
        seconds: gives what this rank's forwards, backwards and update took, by these names; on a GPU it waits for their end.
        busy_s: seconds in which this rank ran forwards and backwards; 0 where there is no pipeline.
        window_s: on ranks of the first pipeline stage, seconds from the start of the step to the end of its last backward,
            which is the last one of the pipeline; 0 elsewhere.
    """

    loss_sum: torch.Tensor
    aux_loss_sum: torch.Tensor
    trained_tokens: int
    grad_norm: float
    applied: bool
    seconds: Callable[[], dict[str, float]] = dict
    busy_s: float = 0.0
    window_s: float = 0.0


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


def evaluation_sums(loss_sum: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, *, judged: bool = False) -> torch.Tensor:
    """What an evaluation adds up, for one micro-batch.

    Args:
        loss_sum: sum of the token losses.
        logits: [rows, length, vocabulary].
        labels: int64 [rows, length], UNTRAINED where nothing is trained.
        judged: whether in the place of logits there is what a `ChunkedHead` answers.

    Returns:
        float64 tensor [3]: sum of token losses, trained tokens, tokens whose argmax is right.
    """
    targets = labels[:, 1:]
    trained = targets != UNTRAINED
    right = logits[1] if judged else ((logits[:, :-1].argmax(-1) == targets) & trained).sum()
    return torch.stack([loss_sum.double(), trained.sum().double(), right.double()])
