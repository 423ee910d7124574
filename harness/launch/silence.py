"""When a rank has been silent for too long, and which of the silent ones holds the others up."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from harness.heartbeat import Beat

LEAST_S, TIMES = 60.0, 20.0
"""Without a setting a rank may be silent for this long, and for so many times the longest pause between its marks so far."""
EARLY_S, EARLY_SHARE = 1.2, 0.15
"""So much before the bound a rank is given up, for it is looked at once a second and is to be ended within the bound; of a short bound less,
for marks of other hosts come once a second, too."""
START_S = 1800.0
"""Until a start has done its first step, nothing is known of it: loading a large model is silent for long, and so is compiling in that step."""


@dataclass(frozen=True)
class Silent:
    """The rank that holds the others up.

    Attributes:
        rank: over all hosts.
        seconds: since its last mark.
        bound_s: how long it might have been.
        beat: its last mark.
        stopped: it stands still, as after SIGSTOP.
    """

    rank: int
    seconds: float
    bound_s: float
    beat: Beat
    stopped: bool


class SilenceWatch:
    """Learns how long the ranks of a job are silent between marks.

    Args:
        bound_s: longest silence once the first step of this start is done; None learns it.
    """

    def __init__(self, bound_s: float | None):
        self.bound_s = bound_s
        self._longest_s = 0.0
        self._before: dict[int, Beat] = {}

    def judge(self, beats: Mapping[int, Beat], stopped: Container[int], *, now_s: float) -> Silent | None:
        """The rank to blame, when one that stands still, or all of them, have been silent beyond the bound.

        Ranks wait for one another, so that soon all are silent where one is, but not while the one that they wait for works: the one that
        stands still is to blame, else the first that fell silent.

        Args:
            beats: last mark of each rank that runs.
            stopped: ranks that stand still.
            now_s: on the clock of the marks.
        """
        if not beats:
            return None
        for rank, beat in beats.items():
            before = self._before.get(rank, beat)
            if before.step >= 1 and beat.count > before.count:
                self._longest_s = max(self._longest_s, beat.at_s - before.at_s)
        self._before = dict(beats)
        bound_s = self._bound_s(beats)
        since_s = min([max(beat.at_s for beat in beats.values()), *(beat.at_s for rank, beat in beats.items() if rank in stopped)])
        if now_s - since_s <= bound_s - min(EARLY_S, EARLY_SHARE * bound_s):
            return None
        rank = min(beats, key=lambda rank: (rank not in stopped, beats[rank].at_s))
        return Silent(rank, now_s - beats[rank].at_s, bound_s, beats[rank], rank in stopped)

    def _bound_s(self, beats: Mapping[int, Beat]) -> float:
        if any(beat.step <= beat.first for beat in beats.values()):
            return START_S
        return max(LEAST_S, TIMES * self._longest_s) if self.bound_s is None else self.bound_s
