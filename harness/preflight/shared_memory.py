"""Is there room in /dev/shm for what the ranks of this machine share, and is none of it lost to runs that are dead. Milliseconds."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from harness.preflight.findings import Finding, failed, passed, warned
from harness.units import format_bytes

SEGMENT_BYTES = 66 << 20
"""DeepSpeed's CPU communication takes so much of /dev/shm for each rank (csrc/cpu/comm/shm.cpp)."""
NCCL_SHM_BYTES = 1 << 30
"""NCCL's own advice for containers: `--shm-size=1g`."""
RUN_FILES = ("deepspeed_allreduce_buffer_", "nccl-", "torch_")
LEFT_AFTER_S = 60.0


def room(*, ranks: int, gpu: bool, folder: Path = Path("/dev/shm")) -> Finding:
    """Room for what ranks on this machine share: without it they die of SIGBUS, with no message."""
    name = "shared memory"
    remedy = f"mount -o remount,size=50% {folder}   (docker run --shm-size=8g; in Kubernetes an emptyDir with medium: Memory at {folder})"
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return failed(name, f"{folder} cannot be used: {error.strerror}.", f"mkdir -p {folder} && mount -t tmpfs -o mode=1777 tmpfs {folder}")
    seen = f"{folder}: {format_bytes(usage.free)} free of {format_bytes(usage.total)}"
    needed = 0 if gpu else ranks * SEGMENT_BYTES
    if usage.free < needed:
        verdict = failed if ranks > 1 else warned  # one rank alone may not use it
        return verdict(name, f"{seen}; {ranks} ranks need {format_bytes(needed)}.", remedy)
    if gpu and ranks > 1 and usage.total < NCCL_SHM_BYTES:
        return warned(name, f"{seen}; NCCL wants {format_bytes(NCCL_SHM_BYTES)}.", remedy)
    return passed(name, seen)


def leftovers(folder: Path = Path("/dev/shm")) -> Finding:
    """Segments that runs left in shared memory when they were killed: memory of this machine that nobody uses."""
    name = "leftovers of dead runs"
    found = [path for path in _own_segments(folder) if time.time() - path.stat().st_mtime > LEFT_AFTER_S]
    dead = sorted(set(found) - _mapped(found))
    if not dead:
        return passed(name, f"none in {folder}")
    held = sum(path.stat().st_blocks * 512 for path in dead)
    shown = " ".join(str(path) for path in dead[:4]) + (f" and {len(dead) - 4} more" if len(dead) > 4 else "")
    kinds = sorted({prefix for prefix in RUN_FILES for path in dead if path.name.startswith(prefix)})
    command = " ".join(f"{folder}/{kind}*" for kind in kinds)
    return warned(name, f"{len(dead)} segments without a process hold {format_bytes(held)}: {shown}.", f"rm {command}   (while no run is on)")


def _own_segments(folder: Path) -> list[Path]:
    """Files of this user that look like those of a run; of others' one could not tell who has mapped them."""
    try:
        return [path for path in folder.iterdir() if path.name.startswith(RUN_FILES) and path.is_file() and path.stat().st_uid == os.getuid()]
    except OSError:
        return []


def _mapped(paths: Iterable[Path]) -> set[Path]:
    """Those that a living process has mapped or holds open."""
    wanted, found = {str(path): path for path in paths}, set()
    for process in psutil.process_iter() if wanted else ():
        try:
            used = {mapped.path for mapped in process.memory_maps()} | {opened.path for opened in process.open_files()}
        except (psutil.Error, OSError):
            continue  # gone, or another user's
        found |= {path for text, path in wanted.items() if text in used}
    return found
