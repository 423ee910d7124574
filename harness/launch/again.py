"""Whether a job that its scheduler has started again may start, and whether one that ended is worth another start.

    python -m harness.launch.again RUN_DIR --job JOB --restarts N --since SECONDS --code CODE

The last line of stdout is `again CODE` or `end CODE`: how the job ended, and whether to start it again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.errors import EXIT_FAILURE, EXIT_RESUME_ME, Refused
from harness.formats import ledger, outcome
from harness.formats.outcome import Outcome

Events = Iterable[dict[str, Any]]


def starts_in_vain(events: Events, job: str) -> int:
    """Starts of a job since its last checkpoint; not those in which a host was waited for in vain, for that is no fault of the run."""
    count, met = 0, True
    for event in events:
        kind = event["kind"]
        if kind == "save" and "checkpoint" in event:
            count = 0
        elif kind == "launch" and event["job"] == job:
            count, met = count + 1, False
        elif kind == "start":
            met = True
        elif kind == "stop" and event["state"] == "lost" and not met:
            count, met = max(0, count - 1), True
    return count


def why_over(events: Events, job: str) -> str:
    """Why a job has nothing more to do since its last start; empty when it has."""
    why = ""
    for event in events:
        if event["kind"] == "launch" and event["job"] == job:
            why = ""
        elif event["kind"] == "finish":
            why = "The run is done."
        elif event["kind"] == "asked":
            why = "The run was asked to stop (control/stop)."
    return why


def is_worth_another(ended: Outcome, *, has_trained: bool) -> bool:
    """Whether a run that ended so may end otherwise: it was lost, or failed although it had trained before. Not when it was asked to end."""
    return ended.state == "lost" or (ended.code == EXIT_FAILURE and has_trained)


def begin(run_dir: Path, job: str, *, restarts: int, writes: bool) -> str:
    """Note a start of a job; answers with why there is nothing to do, or with an empty text.

    Args:
        run_dir: folder of the run.
        job: what names the job over all its starts.
        restarts: starts in a row without a new checkpoint, after the first.
        writes: whether this host speaks for the job; the others only look.

    Raises:
        Refused: on the host that speaks, when the job was started too often.
    """
    events = [event for event in ledger.read(run_dir) if "kind" in event]
    known = any(event["kind"] == "launch" and event["job"] == job for event in events)
    if known and (why := why_over(events, job)):
        return why
    if writes:
        if known and starts_in_vain(events, job) > restarts:
            refused = _refusal(run_dir, job, restarts)
            _write(run_dir, refused.state, refused.exit_code, str(refused))
            raise refused
        run_dir.mkdir(parents=True, exist_ok=True)
        ledger.append(run_dir, "launch", job=job)
    return ""


def after(run_dir: Path, job: str, *, restarts: int, since: float, code: int) -> tuple[bool, int]:
    """Whether a job that ended is to be started again, and its exit code.

    Args:
        run_dir: folder of the run.
        job: what names the job over all its starts.
        restarts: starts in a row without a new checkpoint, after the first.
        since: when it was started, in seconds since the epoch.
        code: what the launcher of the starters ended with, where the run left no outcome.
    """
    told = outcome.read_outcome(run_dir)
    ended = told if told is not None and told.time >= since else Outcome("lost" if code == EXIT_RESUME_ME else "failed", code, f"code {code}", 0, 0)
    events = ledger.read(run_dir)
    has_trained = outcome.last_step(run_dir) > 0
    if why_over(events, job) or not (ended.code == EXIT_RESUME_ME or is_worth_another(ended, has_trained=has_trained)):
        return False, ended.code
    if starts_in_vain(events, job) > restarts:
        reason = f"{_too_often(restarts)} the last time so: {ended.reason}"
        _write(run_dir, "failed", EXIT_FAILURE, reason)
        print(reason, file=sys.stderr)
        return False, EXIT_FAILURE
    return True, ended.code


def _too_often(restarts: int) -> str:
    return f"It ended {restarts + 1} times in a row without a new checkpoint,"


def _refusal(run_dir: Path, job: str, restarts: int) -> Refused:
    told = outcome.read_outcome(run_dir)
    return Refused(
        f"{_too_often(restarts)} the last time so: {told.reason if told else 'unknown'}", where=f"job {job}; launch.restarts",
        remedy="Mend what ended it (the logs stand in attempts/), then submit a new job, which goes on from the last checkpoint.",
    )


def _write(run_dir: Path, state: str, code: int, reason: str) -> None:
    final = Outcome(state, code, reason, outcome.last_step(run_dir), outcome.newest_attempt(run_dir)[0])
    outcome.write_outcome(run_dir, final)
    ledger.append(run_dir, "stop", attempt=final.attempt, state=state, code=code, reason=reason, step=final.step)


def main(argv: Sequence[str] | None = None) -> int:
    """Answer on stdout."""
    parser = argparse.ArgumentParser(prog="python -m harness.launch.again", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--job", required=True)
    parser.add_argument("--restarts", type=int, required=True)
    parser.add_argument("--since", type=float, required=True)
    parser.add_argument("--code", type=int, required=True)
    words = parser.parse_args(argv)
    again, code = after(words.run_dir, words.job, restarts=words.restarts, since=words.since, code=words.code)
    print("again" if again else "end", code)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
