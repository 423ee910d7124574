"""When a rank has been silent for too long, and which of the silent ones holds the others up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.heartbeat import Beat

LEAST_S, TIMES = 60.0, 20.0
"""Without a setting a rank may be silent for this long, and for so many times the longest pause between its marks so far."""
START_S = 1800.0
"""Before its first step is done nothing is known of a run; loading a large model is silent for long."""


@dataclass(frozen=True)
class Silent:
    """The rank that holds its host up.

    Attributes:
        local_rank: its place on the host.
        seconds: since its last mark.
        bound_s: how long it might have been.
        beat: its last mark.
        stopped: it stands still, as after SIGSTOP.
    """

    local_rank: int
    seconds: float
    bound_s: float
    beat: Beat
    stopped: bool


class SilenceWatch:
    """Learns how long the ranks of a host are silent between marks.

    Args:
        bound_s: longest silence once the first step is done; None learns it.
    """

    def __init__(self, bound_s: float | None):
        self.bound_s = bound_s
        self._longest_s = 0.0
        self._before: list[Beat] = []

    def judge(self, beats: Sequence[Beat], stopped: Sequence[bool], *, now_s: float) -> Silent | None:
        """The rank to blame, when some rank has been silent beyond the bound.

        Ranks wait for one another, so that soon all are silent: the one that stands still is to blame, else the first that fell silent.

        Args:
            beats: last mark of each rank that runs.
            stopped: which of them stand still.
            now_s: on the clock of the marks.
        """
        for before, beat in zip(self._before, beats, strict=False):
            if before.step >= 1 and beat.count > before.count:
                self._longest_s = max(self._longest_s, beat.at_s - before.at_s)
        self._before = list(beats)
        oldest = max((now_s - beat.at_s, place) for place, beat in enumerate(beats))
        bound_s = self._bound_s(beats)
        if oldest[0] <= bound_s:
            return None
        place = min(range(len(beats)), key=lambda place: (not stopped[place], beats[place].at_s))
        return Silent(place, now_s - beats[place].at_s, bound_s, beats[place], stopped[place])

    def _bound_s(self, beats: Sequence[Beat]) -> float:
        if min(beat.step for beat in beats) <= 1:
            return START_S
        return self.bound_s if self.bound_s is not None else max(LEAST_S, TIMES * self._longest_s)
