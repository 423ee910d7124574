"""Who trains on a prepared set: a lock that every rank holds, so that no preparation replaces the set meanwhile."""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack, suppress
from pathlib import Path

from harness.config.schema import Data
from harness.errors import Refused
from harness.formats.index import NAME as INDEX

NAME = ".in_use"


def hold(data: Data) -> ExitStack:
    """Hold every set on this host's disks until the returned stack is closed; where a folder or its file system has no locks, nobody is kept out."""
    held = ExitStack()
    for place in [data.dir] if data.sets is None else [spec.dir for spec in data.sets.values()]:
        folder = Path(str(place))
        with suppress(OSError):
            if folder.is_dir():
                descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
                held.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
    return held


def refuse_replacing(data: Data, *, where: str) -> None:
    """Keep a preparation that is due from a finished set on which somebody trains.

    Raises:
        Refused: when another process holds it.
    """
    folder = Path(str(data.dir))
    if not (folder / "train" / INDEX).is_file():
        return
    try:
        descriptor = os.open(folder / NAME, os.O_RDWR)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refused(
            f"A run trains on the prepared set in {data.dir}, which this run file would replace: its sources, tokenizer, template or options are others.",
            where=where, remedy="Set `data.dir` to another folder, or wait for the end of that run.",
        ) from None
    except OSError:
        pass  # no locks here
    finally:
        os.close(descriptor)
