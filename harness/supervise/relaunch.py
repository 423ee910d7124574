"""A run that is started again when a rank was lost or failed: with a new port, after a pause, and not for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from harness.errors import EXIT_FAILURE
from harness.formats import ledger, outcome
from harness.formats.outcome import Outcome
from harness.launch import run as launches
from harness.launch.again import is_worth_another
from harness.launch.run import LaunchPlan
from harness.launch.requests import listening
from harness.log import say

LONGEST_PAUSE_S = 60.0


def launch(make_plan: Callable[[], LaunchPlan], *, run_dir: Path, restarts: int) -> Outcome:
    """Start a run, and start it again as long as that helps.

    Args:
        make_plan: a new plan, with a new port: ranks of an earlier start must never be met.
        run_dir: folder of the run.
        restarts: starts after ends that nobody asked for, in a row, without a new checkpoint.

    Returns:
        how it ended in the end.
    """
    in_a_row = 0
    while True:
        before = last_save(run_dir)
        ended = launches.run(make_plan())
        in_a_row = 1 if last_save(run_dir) != before else in_a_row + 1
        if not is_worth_another(ended, has_trained=max(ended.step, outcome.last_step(run_dir)) > 0):
            return ended
        if in_a_row > restarts:
            return _give_up(run_dir, ended, restarts) if restarts else ended
        pause_s = pause(in_a_row)
        run_dir.mkdir(parents=True, exist_ok=True)  # this machine may not see the folder of the run
        ledger.append(run_dir, "relaunch", reason=ended.reason, pause_s=pause_s, in_a_row=in_a_row)
        say(f"{ended.reason.splitlines()[0]} Starting again in {pause_s:.0f} s ({in_a_row} of {restarts} without a new checkpoint) ...")
        if _asked_within(pause_s):
            return ended


def pause(in_a_row: int) -> float:
    """Seconds before a start: 1, 2, 4 and so on, up to a minute."""
    return min(LONGEST_PAUSE_S, 2.0 ** (in_a_row - 1))


def last_save(run_dir: Path) -> tuple[float, int] | None:
    """Time and step of the last checkpoint."""
    saves = [(event["time"], event["step"]) for event in ledger.read(run_dir) if event["kind"] == "save" and "checkpoint" in event]
    return saves[-1] if saves else None


def _give_up(run_dir: Path, ended: Outcome, restarts: int) -> Outcome:
    reason = f"It ended {restarts + 1} times in a row without a new checkpoint, the last time so: {ended.reason}"
    final = Outcome("failed", EXIT_FAILURE, reason, ended.step, ended.attempt)
    outcome.write_outcome(run_dir, final)
    ledger.append(run_dir, "stop", attempt=final.attempt, state=final.state, code=final.code, reason=reason, step=final.step)
    say(reason)
    return final


def _asked_within(seconds: float) -> bool:
    """Wait, but not beyond a request to stop."""
    asked = threading.Event()
    with listening(lambda *_: asked.set()):
        return asked.wait(seconds)
