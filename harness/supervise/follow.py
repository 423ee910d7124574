"""What followers of a job elsewhere share: a folder, a log that grows, and a request to leave it alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.errors import Refused
from harness.launch.requests import listening


def folder(run_dir: Path) -> Path:
    """`RUN_DIR/launch`, where scripts and logs of jobs are kept.

    Raises:
        Refused: when it cannot be made.
    """
    path = run_dir / "launch"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{path} cannot be made: {error.strerror}.", where="run_dir", remedy="Set `run_dir` to a folder that you may write.") from None
    return path


def print_from(path: Path, start: int) -> int:
    """Print what a file holds beyond `start` bytes, and give its length."""
    if not path.is_file():
        return start
    with open(path, "rb") as stream:
        stream.seek(start)
        text = stream.read()
    sys.stdout.write(text.decode("utf-8", "replace"))
    sys.stdout.flush()
    return start + len(text)


@contextmanager
def until_asked() -> Iterator[threading.Event]:
    """An event that is set by the first request; a hangup stays ignored where it was (nohup)."""
    asked = threading.Event()
    with listening(lambda *_: asked.set()):
        yield asked
