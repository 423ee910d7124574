"""Which control groups hold this process, by version 2 or 1, and how many cores they leave it."""

from __future__ import annotations

import math
import os
from pathlib import Path

_ROOT = Path("/")


def groups(controller: str, root: Path = _ROOT) -> list[tuple[Path, str]]:
    """The folder of this process's group and of every group around it, each with its version; a container may see only the outermost.

    Args:
        controller: memory or cpu.
        root: where `/proc` and `/sys` are.
    """
    folders = []
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount, version = (root / "sys/fs/cgroup" / controller, "v1") if controllers else (root / "sys/fs/cgroup", "v2")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        folders += [(mount.joinpath(*parts[:depth]), version) for depth in range(len(parts), -1, -1)]
    return folders


def read(path: Path) -> str:
    """A file of the kernel's; empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def cores(root: Path = _ROOT) -> int:
    """Cores that this process may use: those that it may run on, or as many as a quota of processor time gives it at once."""
    quotas = [_quota(folder, version) for folder, version in groups("cpu", root)]
    return min([len(os.sched_getaffinity(0)), *(max(1, math.ceil(quota)) for quota in quotas if quota is not None)])


def _quota(folder: Path, version: str) -> float | None:
    """Processor time a second, in seconds (admin-guide/cgroup-v2, scheduler/sched-bwc); None without a bound."""
    names = ("cpu.max",) if version == "v2" else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    words = " ".join(read(folder / name) for name in names).split()
    if len(words) != 2 or not all(word.isdigit() and int(word) for word in words):  # `max`, or -1
        return None
    return int(words[0]) / int(words[1])
