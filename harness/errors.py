"""The errors that a user can meet, and the exit code that each one ends a process with.

HarnessError
├── Failure          1   something broke that nobody asked for
├── Refused          2   the user can mend it: what was set, where, which rule it breaks, what to change
├── AnomalyStop      3   training was stopped because its numbers went wrong
├── CheckFailed      4   a check that was asked for did not hold
├── StopRequested   75   stopped on request; the run can be resumed
└── PeerLost        75   another rank is gone; the run can be resumed

Ctrl-C ends a command that is no run with 130, as a shell has it.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_REFUSED = 2
EXIT_ANOMALY = 3
EXIT_CHECK_FAILED = 4
EXIT_RESUME_ME = 75
EXIT_INTERRUPTED = 130


def first_line(error: BaseException) -> str:
    """What an error says first, short enough for a message of ours; its kind where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


class HarnessError(Exception):
    """Base of all errors that are shown as one message instead of a traceback."""

    exit_code = EXIT_FAILURE
    state = "failed"


class Failure(HarnessError):
    """Something broke that was neither asked for nor set by the user."""


class Refused(HarnessError):
    """The input is wrong and the user can mend it.

    Args:
        problem: what was set and which rule it breaks, one sentence.
        where: the place: a key of the run file with its origin, a file and line, a folder.
        remedy: what to change.
    """

    exit_code = EXIT_REFUSED
    state = "refused"

    def __init__(self, problem: str, *, where: str = "", remedy: str = ""):
        self.problem, self.where, self.remedy = problem, where, remedy
        super().__init__(self.text())

    def text(self) -> str:
        """The message as shown: problem, place and remedy on a line each."""
        lines = [self.problem]
        if self.where:
            lines.append(f"  where:  {self.where}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)


class AnomalyStop(HarnessError):
    """Training was stopped because its numbers went wrong."""

    exit_code = EXIT_ANOMALY
    state = "anomaly"


class CheckFailed(HarnessError):
    """A check that was asked for (verify, doctor, review --fail-if) did not hold."""

    exit_code = EXIT_CHECK_FAILED
    state = "check failed"


class StopRequested(HarnessError):
    """The run was stopped on request after saving; it can be resumed."""

    exit_code = EXIT_RESUME_ME
    state = "stopped"


class PeerLost(HarnessError):
    """Another rank, or the way to it, is gone in the middle of a collective; the run can be resumed."""

    exit_code = EXIT_RESUME_ME
    state = "lost"
