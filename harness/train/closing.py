"""The words at the end of an attempt: what the run has by now, and what can be done with it."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from harness.checkpoint import shelf
from harness.formats import outcome
from harness.formats.manifest import LaterVersion, ManifestError, read_manifest
from harness.heartbeat import began
from harness.units import format_seconds

UNREADABLE = (ManifestError, LaterVersion, OSError)


def closing(run_dir: str, *, state: str) -> str:
    """Steps and time, the newest and the best checkpoint, and the commands that go on from here.

    Args:
        run_dir: folder of the run, as it was given.
        state: done or stopped.
    """
    path = Path(run_dir)
    lines = [f"{state.capitalize()} at step {outcome.last_step(path)}, {format_seconds(time.time() - began())} after the start."]
    newest = next((folder for _, folder in shelf.committed(path)), None)
    if newest is None:
        return f"{lines[0]} There is no checkpoint."
    lines.append(f"  newest checkpoint: {_told(newest)}")
    best = _best(path, newest)
    if best not in (None, newest):
        lines.append(f"  best checkpoint:   {_told(best)}")
    word = shlex.quote(run_dir)
    lines.append(f"  harness export {word} --to FOLDER{'' if best in (None, newest) else ' --checkpoint best'}")
    lines.append(f"  harness review {word}")
    return "\n".join(lines)


def _best(run_dir: Path, newest: Path) -> Path | None:
    """The checkpoint of the lowest evaluation loss, as the newest one remembers it."""
    try:
        step = shelf.best(run_dir, int(read_manifest(newest).state.get("best_step") or 0))
    except UNREADABLE:
        return None
    return None if step is None else newest.with_name(shelf.folder_name(step))


def _told(folder: Path) -> str:
    """Its name, and the loss that was measured there."""
    try:
        loss = read_manifest(folder).metrics.get("eval/loss")
    except UNREADABLE as error:
        return f"{folder.name}, which cannot be read: {error}"
    return f"{folder.name}, not evaluated" if loss is None else f"{folder.name}, evaluation loss {loss:.4f}"
