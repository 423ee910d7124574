"""The metrics of a run as they stand after its resumes: the last attempt's line of each step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """One object a step, in order of steps.

    A step that was done again after a resume counts once, as the later attempt did it, and steps that an attempt did
    beyond the point from which the next one resumed, or to which it rolled back itself, are left out until they are done again.
    """
    path = run_dir / "metrics.jsonl"
    by_step: dict[int, dict[str, Any]] = {}
    attempt = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        back = "rolled_back_from" in entry
        if entry["attempt"] != attempt or back:
            attempt = entry["attempt"]
            last = entry["step"] - ("train/loss" in entry)  # an evaluation that is made up for belongs to the step resumed from
            by_step = {step: kept for step, kept in by_step.items() if step <= last}
        if back:
            continue
        by_step[entry["step"]] = by_step.get(entry["step"], {}) | entry
    return [by_step[step] for step in sorted(by_step)]
