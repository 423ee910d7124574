"""The batch equation: rows of a step = micro-batch x accumulation x data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config.load import Loaded
from harness.errors import Refused


@dataclass(frozen=True)
class BatchEquation:
    """How one optimizer step is cut.

    Attributes:
        rows: rows of the global batch.
        micro_batch: rows of one forward pass on one rank.
        accumulation: micro-batches of one rank in a step.
        ranks: data-parallel ranks.
        sequence_length: tokens in a row.
        stages: pipeline stages of each copy.
    """

    rows: int
    micro_batch: int
    accumulation: int
    ranks: int
    sequence_length: int
    stages: int = 1

    def text(self) -> str:
        """The equation in words."""
        tokens = self.rows * self.sequence_length
        copies = f"{self.ranks} pipeline{'s' if self.ranks > 1 else ''} of {self.stages} stages" if self.stages > 1 else f"{self.ranks} ranks"
        return (
            f"{self.rows} rows = micro-batch {self.micro_batch} x accumulation {self.accumulation} x {copies}"
            f" = {tokens:,} tokens of {self.sequence_length} a row"
        )


def batch_equation(loaded: Loaded, ranks: int) -> BatchEquation:
    """Derive the accumulation.

    Args:
        loaded: the run file.
        ranks: data-parallel ranks.

    Raises:
        Refused: when nothing or too much is set, or when the division leaves a rest.
    """
    train, length = loaded.run.train, loaded.run.data.sequence_length
    if (train.global_batch_rows is None) == (train.global_batch_tokens is None):
        raise Refused(
            "Set exactly one of `train.global_batch_rows` and `train.global_batch_tokens`.",
            where=loaded.origin("train"), remedy="Remove one of them, or add the missing one.",
        )
    if train.global_batch_tokens is not None:
        rows, rest = divmod(train.global_batch_tokens, length)
        if rest or not rows:
            raise Refused(
                f"`train.global_batch_tokens` is {train.global_batch_tokens}, not a multiple of `data.sequence_length` {length}.",
                where=loaded.origin("train.global_batch_tokens"), remedy=f"Use {max(1, rows) * length} or {(rows + 1) * length}.",
            )
        key = "train.global_batch_tokens"
    else:
        rows, key = train.global_batch_rows, "train.global_batch_rows"
    portion = train.micro_batch * ranks
    if rows % portion:
        below = rows // portion * portion
        choices = f"{below} or {below + portion}" if below else f"{portion}"
        raise Refused(
            f"The global batch of {rows} rows does not divide into micro-batches of {train.micro_batch} rows on {ranks} ranks.",
            where=f"{loaded.origin(key)} and train.micro_batch ({loaded.origin('train.micro_batch')})",
            remedy=f"Use a global batch of {choices} rows, or another micro-batch.",
        )
    return BatchEquation(rows, train.micro_batch, rows // portion, ranks, length, loaded.run.engine.pipeline_stages)
