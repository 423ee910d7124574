"""Who trains in a run's folder: a lock that rank 0 holds as long as it lives, also over hosts that share the folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from harness.errors import Refused

_WHO = "running"
_held: list[int] = []


class Occupied(Refused):
    """Another process trains in the folder, to whose run nothing may be written."""


def hold(run_dir: Path) -> None:
    """Keep other attempts out until this process is gone; on a file system without locks nothing is kept out.

    Raises:
        Occupied: when one is there.
    """
    place = run_dir / "control" / _WHO
    place.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
    if _is_taken(descriptor):
        raise _occupied(run_dir, descriptor)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}).encode(), 0)
    _held.append(descriptor)


def refuse_occupied(run_dir: Path) -> None:
    """Look whether another process trains there.

    Raises:
        Occupied: when one does.
    """
    try:
        descriptor = os.open(run_dir / "control" / _WHO, os.O_RDWR)
    except OSError:
        return
    try:
        if _is_taken(descriptor):
            raise _occupied(run_dir, descriptor)
    finally:
        os.close(descriptor)


def is_occupied(run_dir: Path) -> bool:
    """Whether another process trains there."""
    try:
        refuse_occupied(run_dir)
    except Occupied:
        return True
    return False


def _is_taken(descriptor: int) -> bool:
    """Try to take it. A record lock: no child inherits it, and NFS passes it on to the other hosts."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # no locks here
        return False
    return False


def _occupied(run_dir: Path, descriptor: int) -> Occupied:
    try:
        told = json.loads(os.pread(descriptor, 4096, 0))
        who = f"process {told['pid']} on {told['host']}, since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(told['time']))}"
    except (ValueError, KeyError, TypeError, OSError):
        who = "another process"
    return Occupied(
        f"A run is under way in {run_dir}: {who}.", where="run_dir",
        remedy=f"Wait for its end, touch {run_dir / 'control' / 'stop'} to ask for it, or set `run_dir` to another folder.",
    )
