"""Who trains in a run's folder: a lock that rank 0 holds as long as it lives, and a sign of life beside it.

On one machine the kernel lets go of a lock whatever ends its holder. A file server may keep the lock of a machine that is gone, for ever with
NFS 3: there the sign of life decides, and a run that was lost goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.errors import Refused
from harness.log import say

BEAT_S = 5.0
DEAD_S = 60.0
"""A holder on another machine that gave no sign for so long is gone."""
_WHO = "running"
_held: list[int] = []


class Occupied(Refused):
    """Another process trains in the folder, to whose run nothing may be written; `job` is where its ranks meet."""

    job = ""


def hold(run_dir: Path) -> None:
    """Keep other attempts out until this process is gone; on a file system without locks nobody is kept out.

    Raises:
        Occupied: when one is there.
    """
    place = run_dir / "attempts" / _WHO
    place.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
    if _is_taken(descriptor):
        holder = _holder(descriptor)
        if holder.get("machine") == _machine() or _gives_a_sign(descriptor):
            raise _occupied(run_dir, holder)
        say(f"The lock of process {holder.get('pid')} on {holder.get('host')} is left over: it gave no sign for {DEAD_S:.0f} s.")
    os.ftruncate(descriptor, 0)
    who = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "time": time.time(), "job": _job()}
    os.pwrite(descriptor, json.dumps(who).encode(), 0)
    _held.append(descriptor)
    threading.Thread(target=_live, args=(descriptor,), name="running", daemon=True).start()


def refuse_occupied(run_dir: Path) -> None:
    """Look whether another process trains there; not for the holder itself, whose lock would go with the look.

    Raises:
        Occupied: when one does.
    """
    try:
        descriptor = os.open(run_dir / "attempts" / _WHO, os.O_RDWR)
    except OSError:
        return
    try:
        if _is_taken(descriptor):
            holder, silent_s = _holder(descriptor), time.time() - os.fstat(descriptor).st_mtime
            if holder.get("machine") == _machine() or silent_s < DEAD_S:
                raise _occupied(run_dir, holder)
    finally:
        os.close(descriptor)


def is_occupied(run_dir: Path) -> bool:
    """Whether another process trains there."""
    try:
        refuse_occupied(run_dir)
    except Occupied:
        return True
    return False


def is_foreign(run_dir: Path, *, main: bool) -> bool:
    """Whether another job trains there than the one of this rank, the `main` one or one whose rank 0 may hold the folder already."""
    if _held:
        return False
    try:
        refuse_occupied(run_dir)
    except Occupied as told:
        return main or told.job != _job()
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


def _live(descriptor: int) -> None:
    while True:
        time.sleep(BEAT_S)  # the first sign was the writing of the name
        with suppress(OSError):
            os.utime(descriptor)


def _gives_a_sign(descriptor: int) -> bool:
    """Whether the holder lives: until it is seen to, or long enough; clocks of two machines are not compared."""
    seen, deadline = os.fstat(descriptor).st_mtime_ns, time.monotonic() + DEAD_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, BEAT_S))
        if os.fstat(descriptor).st_mtime_ns != seen:
            return True
        if not _is_taken(descriptor):
            return False
    return False


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        told = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, OSError):
        return {}
    return told if isinstance(told, dict) else {}


def _machine() -> str:
    """The same for all containers of a machine, and another after it was started anew; names of pods come back elsewhere."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _job() -> str:
    """Where the ranks of this job meet, as far as its launcher said."""
    return ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))


def _occupied(run_dir: Path, holder: dict[str, Any]) -> Occupied:
    who = "another process"
    if {"pid", "host", "time"} <= holder.keys():
        who = f"process {holder['pid']} on {holder['host']}, since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(holder['time']))}"
    occupied = Occupied(
        f"A run is under way in {run_dir}: {who}.", where="run_dir",
        remedy=f"Wait for its end, touch {run_dir / 'control' / 'stop'} to ask for it, or set `run_dir` to another folder.",
    )
    occupied.job = str(holder.get("job", ""))
    return occupied
