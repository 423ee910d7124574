"""How much memory of this host a process may still take, by the kernel and by the limits of its container."""

from __future__ import annotations

from pathlib import Path

from harness.cgroup import groups, read

_ROOT = Path("/")
_NAMES = {  # limit, usage, and the counts of pages that the kernel gives up when memory is short (admin-guide/cgroup-v2, cgroup-v1/memory)
    "v2": ("memory.max", "memory.current", ("inactive_file", "active_file")),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}


def available_bytes(root: Path = _ROOT) -> int | None:
    """Bytes that can be taken without swapping and without passing a limit; None where the system does not tell.

    Args:
        root: where `/proc` and `/sys` are.
    """
    found = [_available_to_host(root), *(_left_of_group(folder, version) for folder, version in groups("memory", root))]
    return min((left for left in found if left is not None), default=None)


def _available_to_host(root: Path) -> int | None:
    lines = read(root / "proc/meminfo").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left_of_group(folder: Path, version: str) -> int | None:
    limit, usage, reclaimable = _NAMES[version]
    bound, used = read(folder / limit).strip(), read(folder / usage).strip()
    if not bound.isdigit() or not used.isdigit():
        return None
    counts = dict(line.split() for line in read(folder / "memory.stat").splitlines())
    return max(0, int(bound) - int(used) + sum(int(counts.get(name, 0)) for name in reclaimable))
