"""Where a run stands: saved with every checkpoint, and all that a resume or a rollback goes back to besides weights and moments."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint.

    Attributes:
        step: optimizer steps done.
        rows: rows consumed: the cursor.
        first_row: rows that were consumed before the order in force began; above 0 once appended data were accepted.
        trained_tokens: trained tokens so far.
        best_loss: lowest evaluation loss so far.
        best_step: its step.
        bad_evaluations: evaluations since the best.
        passed: (first, last + 1) of rows that are left out for good.
        rollbacks: how often a spike took the run back.
        past_losses: what the next loss is held against.
    """

    step: int = 0
    rows: int = 0
    first_row: int = 0
    trained_tokens: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    bad_evaluations: int = 0
    passed: list[list[int]] = field(default_factory=list)
    rollbacks: int = 0
    past_losses: list[float] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {key: (None if value == math.inf else value) for key, value in asdict(self).items()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        """From JSON."""
        return cls(**{**state, "best_loss": math.inf if state["best_loss"] is None else state["best_loss"]})
