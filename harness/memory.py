"""How much memory of this host a process may still take, by the kernel and by the limits of its container."""

from __future__ import annotations

from pathlib import Path

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
    found = [_available_to_host(root), *(_left_of_group(folder, version) for folder, version in _groups(root))]
    return min((left for left in found if left is not None), default=None)


def _available_to_host(root: Path) -> int | None:
    lines = _read(root / "proc/meminfo").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _groups(root: Path) -> list[tuple[Path, str]]:
    """The folder of this process's memory group and of every group around it; a container may see only the outermost."""
    folders = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount, version = (root / "sys/fs/cgroup/memory", "v1") if controllers else (root / "sys/fs/cgroup", "v2")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        folders += [(mount.joinpath(*parts[:depth]), version) for depth in range(len(parts), -1, -1)]
    return folders


def _left_of_group(folder: Path, version: str) -> int | None:
    limit, usage, reclaimable = _NAMES[version]
    bound, used = _read(folder / limit).strip(), _read(folder / usage).strip()
    if not bound.isdigit() or not used.isdigit():
        return None
    counts = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
    return max(0, int(bound) - int(used) + sum(int(counts.get(name, 0)) for name in reclaimable))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
