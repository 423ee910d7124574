"""The exact loss, perplexity and token accuracy of a whole validation set, whatever the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness import distributed

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
    """

    loss: float
    token_accuracy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def metrics(self) -> dict[str, float]:
        """The metrics by tag."""
        return {"eval/loss": self.loss, "eval/perplexity": self.perplexity, "eval/token_accuracy": self.token_accuracy}


def evaluate(engine: CommonEngine, batches: Iterable[Batch]) -> Evaluation:
    """Run every batch; all ranks must hold equally many."""
    sums = engine.eval_sums(batches)
    distributed.all_reduce_sum(sums)
    loss_sum, tokens, right = sums.tolist()
    return Evaluation(loss_sum / max(tokens, 1), right / max(tokens, 1), int(tokens))
