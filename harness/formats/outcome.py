"""`outcome.json`: how the last attempt of a run ended."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from harness import files

VERSION = 1
NAME = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """The end of an attempt.

    Attributes:
        state: done, failed, refused, anomaly, check failed, stopped, or lost: a rank, or what started it, is gone.
        code: exit code of every rank.
        reason: one message.
        step: optimizer steps done by then.
        attempt: its number; 0 when it was refused before it began.
        time: seconds since the epoch.
    """

    state: str
    code: int
    reason: str
    step: int
    attempt: int
    time: float = field(default_factory=time.time)
    version: int = VERSION


def write_outcome(run_dir: Path, outcome: Outcome) -> None:
    """Replace the outcome of the run in one step."""
    files.write_json(run_dir / NAME, asdict(outcome))


def read_outcome(run_dir: Path) -> Outcome | None:
    """The outcome of the last attempt, or None when there is none that can be read."""
    return _read(run_dir / NAME)


def _read(path: Path) -> Outcome | None:
    try:
        return Outcome(**files.read_json(path))
    except (OSError, ValueError, TypeError):
        return None


def newest_attempt(run_dir: Path) -> tuple[int, Path | None]:
    """Number and folder of the newest attempt; 0 and None when there is none."""
    numbered = [(int(path.name), path) for path in (run_dir / "attempts").glob("[0-9]*") if path.name.isdigit()]
    return max(numbered, default=(0, None))


def write_end(run_dir: Path, rank: int, outcome: Outcome) -> None:
    """Leave how one rank ended beside its log, for its starter."""
    _, folder = newest_attempt(run_dir)
    if folder is not None:
        (folder / "logs").mkdir(exist_ok=True)
        files.write_json(folder / "logs" / f"rank-{rank:05d}.end.json", asdict(outcome))


def read_end(run_dir: Path, rank: int, *, since: float) -> Outcome | None:
    """How one rank of the newest attempt ended, if it could still say so.

    Args:
        run_dir: folder of the run.
        rank: the rank.
        since: an older one, in seconds since the epoch, is another attempt's.
    """
    _, folder = newest_attempt(run_dir)
    end = _read(folder / "logs" / f"rank-{rank:05d}.end.json") if folder else None
    return end if end is not None and end.time >= since else None


def last_step(run_dir: Path) -> int:
    """The last step that the metrics of a run's last attempt hold; 0 when there is none. What a checkpoint took is told after later steps."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return 0
    with open(path, "rb") as stream:
        stream.seek(max(0, path.stat().st_size - 8192))
        lines = stream.read().splitlines()
    entries = [entry for line in lines if (entry := _entry(line))]
    return max((entry["step"] for entry in entries if entry["attempt"] == entries[-1]["attempt"]), default=0)


def _entry(line: bytes) -> dict[str, int] | None:
    """Attempt and step of a line of the metrics; None where a crash or the reader cut it."""
    try:
        content = json.loads(line)
        return {"attempt": int(content.get("attempt", 0)), "step": int(content["step"])}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
