"""The lives of a run's first rank, one an attempt, put together from the ledger and from the lines of all attempts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.formats import ledger

Phases = dict[str, float]
BY_OTHERS = ("launch", "asked", "skip", "relaunch", "stop")
"""Events that are no sign of life: told by what starts attempts, or before an attempt tells that it began."""


@dataclass
class Line:
    """What was written to the metrics at one moment.

    Attributes:
        attempt: that wrote it.
        step: optimizer steps done by then.
        time: seconds since the epoch.
        is_step: it tells of a step of training, not of an evaluation or a checkpoint.
        is_back: it tells of a rollback, to `step`.
        phases: seconds by phase since the line before.
        stands: nothing took its steps back, and a later attempt need not do them again.
    """

    attempt: int
    step: int
    time: float
    is_step: bool
    is_back: bool
    phases: Phases
    stands: bool = True


@dataclass
class Life:
    """One process of the first rank.

    Attributes:
        began: when it was started, in seconds since the epoch.
        attempt: its number; 0 when it ended before it had one.
        resumed: step from which it went on.
        saved: step of the last checkpoint that it left.
        told: seconds by phase up to its first step, as far as it told.
        first_step: when its first step was done.
        phases: seconds by phase from start to end; None when nobody was left to tell.
        waited_s: in the phase in which it ended, where it went wrong.
        ended: when it was gone, or said that it would be.
        closed: last event of it or about it.
        state: how it ended; empty when nobody told.
        relaunched: it was started again by what had started it.
        lines: that it wrote to the metrics.
    """

    began: float
    attempt: int
    closed: float
    resumed: int = 0
    saved: int = 0
    told: Phases = field(default_factory=dict)
    first_step: float | None = None
    phases: Phases | None = None
    waited_s: float = 0.0
    ended: float | None = None
    state: str = ""
    relaunched: bool = False
    lines: list[Line] = field(default_factory=list)

    @property
    def last_told(self) -> float:
        """When it was last heard of."""
        return max([self.closed, *(line.time for line in self.lines)])

    @property
    def in_order(self) -> bool:
        """Whether it ended as it was to end, with nothing left unsaved."""
        return self.state in ("done", "stopped")


def read_lives(run_dir: Path) -> list[Life]:
    """All of them, in the order in which they began, with their lines; lines of steps that were lost are marked.

    Args:
        run_dir: folder of the run.
    """
    lives: list[Life] = []
    for event in ledger.read(run_dir):
        _take(lives, event)
    lives.sort(key=lambda life: life.began)
    _give_lines(lives, _read_lines(run_dir / "metrics.jsonl"))
    return lives


def _take(lives: list[Life], event: dict[str, Any]) -> None:
    """Let one event tell of the life that it belongs to: the one that it names by `began`, else the last."""
    kind, when = event["kind"], event["time"]
    life = next((one for one in lives if one.began == event.get("began")), None)
    if life is None and event.get("began"):
        life = Life(event["began"], event.get("attempt", 0) if kind == "start" else 0, when)
        lives.append(life)
        is_over = False
    elif life is None and lives:
        life = lives[-1]
        is_over = life.relaunched or (life.ended is not None and kind != "relaunch")
    else:
        is_over = life is None
    if life is None or is_over:
        return
    if kind not in BY_OTHERS or life.ended is not None or "phases" in event:
        life.closed = max(life.closed, when)
    if kind == "start":
        life.attempt, life.told = event["attempt"], event.get("phases", {})
    elif kind == "running":
        life.first_step, life.told = when, event["phases"]
    elif kind == "resume":
        life.resumed = life.saved = event["step"]
    elif kind == "save" and "checkpoint" in event:
        life.saved = event["step"]
    elif kind == "relaunch":
        life.relaunched = True
    elif kind in ("stop", "finish") and "phases" in event and life.phases is None:
        life.phases, life.waited_s, life.state = event["phases"], event.get("waited_s", 0.0), event["state"]
        life.ended = event.get("gone", when)


def _read_lines(path: Path) -> list[Line]:
    """Every line; one that a crash cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(text)
            lines.append(Line(entry["attempt"], entry["step"], entry["time"], "train/loss" in entry, "rolled_back_from" in entry, entry.get("phases", {})))
        except (json.JSONDecodeError, KeyError):
            continue
    return lines


def _give_lines(lives: list[Life], lines: list[Line]) -> None:
    """Hand out the lines, and follow which of them stand: a resume, or a step that is done again, takes back what lies beyond."""
    standing: list[Line] = []

    def take_back(after: int) -> None:
        while standing and standing[-1].step > after:
            standing.pop().stands = False

    for life in lives:
        life.lines = [line for line in lines if line.attempt == life.attempt]
        if life.attempt and (life.lines or life.resumed):
            take_back(life.resumed)
        for line in life.lines:
            if line.is_step or line.is_back:
                take_back(line.step - line.is_step)
            standing.append(line)
    if lives and lives[-1].ended is not None:
        take_back(lives[-1].saved)
