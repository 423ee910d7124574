"""A step between its update and the boundary at which the ranks agree on what it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.engine.steps import StepResult
    from harness.resilience.agreement import Agreed


@dataclass(frozen=True)
class Work:
    """What a token costs.

    Attributes:
        flops_per_token: of the model, forward and backward, or None where that is not known.
        ranks: that share the work.
        peak: operations a second that the GPU of a rank can do, or None where that is not known.
    """

    flops_per_token: float | None
    ranks: int
    peak: float | None


@dataclass
class OpenStep:
    """A step whose sums are still on their way between the ranks; `is_full` unless empty rows filled its batch up."""

    step: int
    rows: int
    result: StepResult
    lr: float
    seconds: float
    data_wait_seconds: float
    positions: int
    first_row: int
    is_full: bool

    def metrics(self, agreed: Agreed, rows_per_epoch: int | None, work: Work) -> dict[str, float]:
        """The metrics by tag.

        Args:
            agreed: sums over all ranks.
            rows_per_epoch: of the training set, where it is known.
            work: what a token costs.
        """
        per_second = self.positions / max(self.seconds, 1e-9)
        metrics = {
            "train/loss": agreed.loss_sum / max(self.result.trained_tokens, 1),
            "train/tokens": self.result.trained_tokens,
            "optim/lr": self.lr,
            "optim/grad_norm": self.result.grad_norm,
            "optim/skipped": 0 if self.result.applied else 1,
            "speed/step_seconds": self.seconds,
            "speed/tokens_per_second": per_second,
            "speed/data_wait_seconds": self.data_wait_seconds,
        }
        metrics |= {f"speed/{name}_seconds": seconds for name, seconds in self.result.seconds().items()}
        if work.flops_per_token:
            metrics["speed/flops_per_rank"] = per_second * work.flops_per_token / work.ranks
            if work.peak:
                metrics["speed/mfu"] = metrics["speed/flops_per_rank"] / work.peak
        if rows_per_epoch:
            metrics["train/epoch"] = self.rows / rows_per_epoch
        if agreed.aux_loss:
            metrics["train/aux_loss"] = agreed.aux_loss
        if agreed.idle_share is not None:
            metrics["speed/pipeline_idle_share"] = agreed.idle_share
        return metrics


class Spike(Exception):  # noqa: N818 (told as what it is)
    """Raised on all ranks when a step is to be taken back."""

    def __init__(self, step: OpenStep, told: str):
        self.step, self.told = step, told
