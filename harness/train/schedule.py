"""The learning rate of every step, as a pure function."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then a course.

    Attributes:
        kind: cosine, linear, constant or warmup_stable_decay.
        peak: highest learning rate.
        total_steps: steps of the run.
        warmup_steps: steps from 0 to the peak; step s of them has the share s / warmup_steps.
        decay_steps: last steps that fall, under warmup_stable_decay.
        min_share: where the fall ends, as a share of the peak.
    """

    kind: str
    peak: float
    total_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    min_share: float = 0.0

    def lr(self, step: int) -> float:
        """The learning rate of optimizer step `step`, from 1 to `total_steps`."""
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        done = self._progress(step)
        if self.kind == "constant":
            share = 1.0
        elif self.kind == "cosine":
            share = self.min_share + (1 - self.min_share) * 0.5 * (1 + math.cos(math.pi * done))
        else:
            share = self.min_share + (1 - self.min_share) * (1 - done)
        return self.peak * share

    def _progress(self, step: int) -> float:
        """Share of the fall that lies behind before `step`: 0 on its first step, below 1 on the last."""
        start = self.total_steps - self.decay_steps if self.kind == "warmup_stable_decay" else self.warmup_steps
        length = self.total_steps - start
        return min(1.0, max(0.0, (step - 1 - start) / length)) if length > 0 else 0.0
