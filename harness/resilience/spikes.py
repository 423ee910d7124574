"""Losses that leave their recent past: a robust z-score, judged after the step, the same on all ranks because the loss is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

WINDOW, LEAST = 128, 20
MAD_TO_SIGMA = 1.4826
"""Standard deviations in a median absolute deviation, of a normal distribution (Rousseeuw and Croux, 1993)."""
FLOOR = 1e-3
"""The smallest spread that is believed, as a share of the loss: a loss that hardly moves would make anything a spike."""


class SpikeWatch:
    """The recent losses, and whether a new one stands out of them.

    Args:
        zscore: distance from the median, in standard deviations, from which a loss is a spike.
        past: losses that were seen before, oldest first.
    """

    def __init__(self, zscore: float, past: Iterable[float] = ()):
        self.zscore = zscore
        self._past: deque[float] = deque(past, maxlen=WINDOW)

    @property
    def past(self) -> list[float]:
        """The losses that the next one is held against, oldest first."""
        return list(self._past)

    def judge(self, loss: float) -> float | None:
        """The z-score of a loss that is a spike, else None; until there is a past of 20 losses nothing is.

        A spike becomes part of the past too, so that a loss which stays where it jumped is soon no spike any more.
        """
        if not math.isfinite(loss):
            return None
        past = sorted(self._past)
        self._past.append(loss)
        if len(past) < LEAST:
            return None
        middle = median(past)
        spread = MAD_TO_SIGMA * median(abs(one - middle) for one in past)
        score = (loss - middle) / max(spread, FLOOR * abs(middle), 1e-12)
        return score if score > self.zscore else None
