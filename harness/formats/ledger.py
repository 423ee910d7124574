"""`events.jsonl`: what happened to a run, in order, with cause; goodput is computed from it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from harness.files import open_to_append

VERSION = 1
NAME = "events.jsonl"
KINDS = (
    "launch", "asked", "start", "running", "relaunch", "stop", "finish", "save", "unsaved", "resume", "skip", "anomaly", "imbalance",
    "appended", "rollback", "trace",
)


def append(run_dir: Path, kind: str, **facts: Any) -> None:
    """Add one event; `kind` is one of KINDS."""
    assert kind in KINDS, kind
    line = json.dumps({"version": VERSION, "time": time.time(), "kind": kind, **facts}, ensure_ascii=False)
    with open_to_append(run_dir / NAME) as stream:
        stream.write(line + "\n")


def read(run_dir: Path) -> list[dict[str, Any]]:
    """All events, oldest first; a line that a crash cut short is left out."""
    path = run_dir / NAME
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events
