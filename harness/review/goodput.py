"""Where the wall clock of a run went, from the start of its first attempt to its last event, over all restarts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import Refused
from harness.review.lives import Life, Phases, read_lives

STARTS = {"start": "start-up: import", "meet": "start-up: meet", "build": "start-up: build", "load": "start-up: load"}
FIRST_BATCH = "start-up: first batch"
TRAINING, WAITING, LOST = "training that stands", "waiting for data", "lost work"
EVALUATION, SAVING = "evaluation", "saving"
DETECTION, SHUTDOWN, RELAUNCH, NOBODY = "standing still before an end", "shutdown", "from an end to the relaunch", "nobody ran it"
OTHERS = {"evaluate": EVALUATION, "generate": EVALUATION, "save": SAVING, "end": SHUTDOWN}
ROWS = (*STARTS.values(), FIRST_BATCH, TRAINING, WAITING, LOST, EVALUATION, SAVING, DETECTION, SHUTDOWN, RELAUNCH, NOBODY)
"""All that is told apart; each is measured by itself, and none is what the others leave."""


@dataclass(frozen=True)
class Start:
    """What an attempt took from its start to its first step.

    Attributes:
        attempt: its number; 0 when it ended before it had one.
        state: how it ended; empty when nobody told.
        phases: seconds by phase, the first step's own as `first step`.
        first_step_s: from its start until its first step was done; None when it did not get there.
    """

    attempt: int
    state: str
    phases: dict[str, float]
    first_step_s: float | None


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run by what they went to.

    Attributes:
        wall_s: from the start of the first attempt to the last that is known of the run.
        seconds: by category, one of ROWS.
        starts: of every attempt.
    """

    wall_s: float
    seconds: dict[str, float]
    starts: tuple[Start, ...]

    @property
    def unaccounted_s(self) -> float:
        """What no category explains; below zero where some seconds were counted twice."""
        return self.wall_s - sum(self.seconds.values())

    @property
    def share(self) -> float:
        """The goodput: training that stands as a share of the wall clock."""
        return self.seconds[TRAINING] / self.wall_s if self.wall_s else 0.0

    def as_json(self) -> dict[str, Any]:
        """All of it, in seconds."""
        return {
            "wall_s": round(self.wall_s, 3), "goodput": round(self.share, 4), "unaccounted_s": round(self.unaccounted_s, 3),
            "seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
            "attempts": [{"attempt": one.attempt, "state": one.state, "first_step_s": one.first_step_s, "phases": one.phases} for one in self.starts],
        }


def goodput(run_dir: Path) -> Goodput:
    """Account for the time of a run, also of one that still goes on.

    Args:
        run_dir: folder of the run.

    Raises:
        Refused: when there is no run, or one of a version that kept no time.
    """
    lives = read_lives(run_dir)
    if not lives:
        raise Refused(f"{run_dir} holds no run that kept time.", where="RUN_DIR", remedy="Name the folder of a run: `run_dir` of its run file.")
    seconds = dict.fromkeys(ROWS, 0.0)
    for life in lives:
        for name, found_s in _of_life(life):
            seconds[name] += found_s
    for life, after in zip(lives, lives[1:], strict=False):
        seconds[RELAUNCH if life.relaunched else NOBODY] += max(0.0, after.began - life.last_told)
    wall_s = max(life.last_told for life in lives) - lives[0].began
    return Goodput(wall_s, seconds, tuple(_start(life) for life in lives))


def _of_life(life: Life) -> list[tuple[str, float]]:
    """Category and seconds of all that one attempt did."""
    found, told, has_stepped = [], {}, False
    for line in life.lines:
        found += _sort(line.phases, stands=line.stands, has_stepped=has_stepped)
        told = {phase: told.get(phase, 0.0) + line.phases.get(phase, 0.0) for phase in told | line.phases}
        has_stepped |= line.is_step
    whole = life.phases if life.phases is not None else {} if told else life.told
    rest = {phase: whole_s - told.get(phase, 0.0) for phase, whole_s in whole.items()}
    found += _sort(rest, stands=life.in_order or life.phases is None, has_stepped=has_stepped)
    found.append((DETECTION, life.waited_s))
    if life.ended is not None:
        found.append((SHUTDOWN, max(0.0, life.closed - life.ended)))
    return found


def _sort(phases: Phases, *, stands: bool, has_stepped: bool) -> list[tuple[str, float]]:
    """Seconds by category.

    Args:
        phases: seconds by phase.
        stands: what was trained in them was not lost.
        has_stepped: the attempt had done its first step before.
    """
    found = []
    for phase, phase_s in phases.items():
        if phase == "data" and not has_stepped:
            name = FIRST_BATCH
        elif phase == "load" and has_stepped:
            name = LOST  # a rollback
        elif phase in STARTS or phase in OTHERS:
            name = (STARTS | OTHERS)[phase]
        else:
            name = LOST if not stands else WAITING if phase == "data" else TRAINING
        found.append((name, phase_s))
    return found


def _start(life: Life) -> Start:
    names = {phase: name.removeprefix("start-up: ") for phase, name in (STARTS | {"data": FIRST_BATCH}).items()}
    told = life.told if life.first_step is not None or life.phases is None else life.phases
    phases = {name: told[phase] for phase, name in names.items() if phase in told}
    first_step_s = None
    if life.first_step is not None:
        phases |= {EVALUATION: sum(told.get(phase, 0.0) for phase in ("evaluate", "generate"))} if "evaluate" in told else {}
        phases["first step"] = round(sum(told.get(phase, 0.0) for phase in ("forward", "backward", "reduce", "step")), 3)
        first_step_s = round(life.first_step - life.began, 3)
    return Start(life.attempt, life.state, phases, first_step_s)
