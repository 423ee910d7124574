"""How a job ended, put together from what its ranks wrote and from what their starter saw."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness.errors import EXIT_DONE, EXIT_FAILURE, EXIT_RESUME_ME
from harness.formats import ledger, outcome
from harness.formats.outcome import Outcome
from harness.formats.running import is_occupied
from harness.heartbeat import Beat
from harness.launch.silence import Silent

CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGTRAP}
SETTLED = ("done", "stopped", "refused", "anomaly", "check failed")
"""What rank 0 says of all ranks together; anything else may be the echo of what befell another."""


@dataclass(frozen=True)
class End:
    """How the first rank ended that did not end well.

    Attributes:
        rank: over all hosts.
        code: its exit code; negative: the signal that killed it.
        beat: its last mark.
        host: where it was.
        silent: it was ended for its silence.
        lost: what is known where its whole host is gone.
    """

    rank: int
    code: int
    beat: Beat
    host: str
    silent: Silent | None = None
    lost: str = ""

    @property
    def is_foreign(self) -> bool:
        """Whether the rank itself had no say in it, so that no rank can have told why."""
        return self.silent is not None or self.code < 0

    def exit_code(self) -> int:
        """Of the job: what happened to a rank is a reason to resume, what it did is not."""
        if self.silent is not None or (self.code < 0 and -self.code not in CRASHES):
            return EXIT_RESUME_ME
        return self.code if self.code > 0 else EXIT_FAILURE

    def reason(self) -> str:
        """One sentence."""
        if self.lost:
            return self.lost
        where = f"in phase {self.beat.phase} of step {self.beat.step}" if self.beat.step else f"in phase {self.beat.phase}"
        if self.silent is not None:
            how = "stood still (stopped)" if self.silent.stopped else "was silent"
            return f"Rank {self.rank} on {self.host} {how} for {self.silent.seconds:.0f} s {where}; the bound is {self.silent.bound_s:.0f} s."
        if self.code < 0:
            return f"Rank {self.rank} on {self.host} was ended by {signal.Signals(-self.code).name} {where}."
        return f"Rank {self.rank} on {self.host} ended with code {self.code} {where}."

    def as_message(self) -> dict[str, Any]:
        """As JSON, for the starters of other hosts."""
        return asdict(self)

    @classmethod
    def from_message(cls, told: dict[str, Any]) -> End:
        """From what another starter sent."""
        silent = told["silent"]
        silent = Silent(**{**silent, "beat": Beat(**silent["beat"])}) if silent else None
        return cls(**{**told, "beat": Beat(**told["beat"]), "silent": silent})


@dataclass(frozen=True)
class Gone:
    """The end of the first rank of a host, whose clock the ledger keeps.

    Attributes:
        beat: its last mark.
        time: when it was gone, in seconds since the epoch.
        waited_s: how long before that it made its last mark.
    """

    beat: Beat
    time: float
    waited_s: float

    def facts(self) -> dict[str, Any]:
        """For the ledger, in the words that a rank uses itself; nothing of a rank that ended before it kept time."""
        if not self.beat.began:
            return {}
        return {"began": self.beat.began, "phases": self.beat.spent_s, "waited_s": round(self.waited_s, 3), "gone": self.time}


@dataclass(frozen=True)
class Ended:
    """How the ranks of a host ended.

    Attributes:
        asked: they were asked to stop.
        first: the first that ended badly, if any.
        gone: the end of the first rank of the host.
    """

    asked: bool
    first: End | None
    gone: Gone | None = None


def settle(ended: Ended, run_dir: Path, *, started: float, writes: bool) -> Outcome:
    """The outcome of a job; what no rank could write of its end is written now.

    Args:
        ended: what the starter saw.
        run_dir: folder of the run.
        started: when the ranks were started, in seconds since the epoch.
        writes: whether this host speaks for the job.
    """
    told = outcome.read_outcome(run_dir)
    told = told if told is not None and told.time >= started else None
    if told is None and ended.first is None and not writes:
        return Outcome("done", EXIT_DONE, "All ranks of this host ended well; how the job ended is not told on its disk.", 0, 0)
    final = judge(ended, told, last_words=lambda rank: outcome.read_end(run_dir, rank, since=started))
    if writes and final is not told and run_dir.is_dir() and not is_occupied(run_dir):
        final = replace(final, step=outcome.last_step(run_dir), attempt=outcome.newest_attempt(run_dir)[0])
        outcome.write_outcome(run_dir, final)
        facts = ended.gone.facts() if ended.gone else {}
        ledger.append(run_dir, "stop", attempt=final.attempt, state=final.state, code=final.code, reason=final.reason, step=final.step, **facts)
    return final


def judge(ended: Ended, told: Outcome | None, *, last_words: Callable[[int], Outcome | None]) -> Outcome:
    """The outcome of a job; step and attempt are those of `told`, or 0.

    Args:
        ended: what the starter saw.
        told: what rank 0 wrote, if anything.
        last_words: what a rank wrote of its own end, if anything.
    """
    first = ended.first
    if told is not None and told.state in SETTLED:
        return told
    if first is not None and first.code > 0 and first.code != EXIT_RESUME_ME:
        by_rank_0 = told if first.rank == 0 else None
        return by_rank_0 or last_words(first.rank) or Outcome("failed", first.exit_code(), first.reason(), 0, 0)
    if ended.asked:  # before a rank could listen, or killed on request: nothing was trained that a resume would lack
        return Outcome("stopped", EXIT_RESUME_ME, "Stopped on request before the ranks could say more.", 0, 0)
    if first is not None and (first.is_foreign or told is None):
        code = first.exit_code()
        return Outcome("lost" if code == EXIT_RESUME_ME else "failed", code, first.reason(), 0, 0)
    return told or Outcome("failed", EXIT_FAILURE, "All ranks ended well, but none left an outcome.", 0, 0)
