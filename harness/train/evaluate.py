"""The exact loss, perplexity and token accuracy of a whole validation set, whatever the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from harness import distributed
from harness.errors import HarnessError
from harness.resilience.agreement import fail_together
from harness.resilience.hearing import Hearing, Interrupted

if TYPE_CHECKING:
    from harness.data.loader import Batch
    from harness.engine.common import CommonEngine


@dataclass(frozen=True)
class Evaluation:
    """Means over the trained tokens of a set.

    Attributes:
        loss: mean token loss, in nats.
        token_accuracy: share of tokens whose argmax is right.
        tokens: trained tokens of the set.
        by_set: the same for each set of a mixture.
    """

    loss: float
    token_accuracy: float
    tokens: int
    by_set: dict[str, Evaluation] = field(default_factory=dict)

    @classmethod
    def of(cls, sums: list[float], by_set: dict[str, Evaluation] | None = None) -> Evaluation:
        """From the sum of token losses, trained tokens, and right tokens."""
        loss_sum, tokens, right = sums
        return cls(loss_sum / max(tokens, 1), right / max(tokens, 1), int(tokens), by_set or {})

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def metrics(self) -> dict[str, float]:
        """The metrics by tag."""
        own = {"eval/loss": self.loss, "eval/perplexity": self.perplexity, "eval/token_accuracy": self.token_accuracy}
        return own | {tag.replace("eval/", f"eval/{name}/"): value for name, one in self.by_set.items() for tag, value in one.metrics().items()}


def evaluate(
    engine: CommonEngine, sets: dict[str, Iterable[Batch]], errors: Sequence[HarnessError] = (), *, hearing: Hearing | None = None
) -> Evaluation:
    """Run every batch of every set; all ranks must hold equally many. Several sets are also told apart by their names.

    Args:
        engine: the engine.
        sets: batches by the name of the set.
        errors: filled by the batches while they are read.
        hearing: of requests to stop, which end it; without one it is not to be stopped.

    Raises:
        Interrupted: on all ranks, when one of them was asked to stop.
        Failure: on all ranks, when one of them could not read its rows.
    """
    sums = torch.stack([engine.eval_sums(hearing.over(batches) if hearing else batches) for batches in sets.values()])
    if hearing and hearing.now():  # before what a request has kept from being read counts as an error
        raise Interrupted
    packed = torch.cat([sums.flatten(), torch.tensor([float(len(errors))], dtype=sums.dtype, device=sums.device)])
    distributed.all_reduce_sum(packed)
    if packed[-1] > 0:
        fail_together(errors[0] if errors else None)
    sums = packed[:-1].view_as(sums)
    by_set = {name: Evaluation.of(own) for name, own in zip(sets, sums.tolist(), strict=True)} if len(sets) > 1 else {}
    return Evaluation.of(sums.sum(0).tolist(), by_set)
