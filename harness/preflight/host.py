"""Is the operating system of this machine fit to train: limits, names, disk, memory. Milliseconds."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

import psutil

from harness.preflight.findings import Finding, failed, passed, skipped, warned
from harness.units import format_bytes

MIN_FILES, GOOD_FILES = 256, 1024
MIN_DISK_BYTES, GOOD_DISK_BYTES = 16 << 20, 5 << 30
MIN_MEMORY_BYTES = 2 << 30
CAP_IPC_LOCK = 14


def open_files() -> Finding:
    """How many files and sockets a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return judge_open_files(soft, hard)


def judge_open_files(soft: int, hard: int) -> Finding:
    """The verdict on the limits of open files."""
    name = "open files"
    if soft == resource.RLIM_INFINITY or soft >= GOOD_FILES:
        return passed(name, "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,} a process")
    may_raise = hard == resource.RLIM_INFINITY or hard >= GOOD_FILES
    remedy = (
        f"ulimit -n {65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)}"
        if may_raise
        else "As root: add `* - nofile 65536` to /etc/security/limits.conf and log in again."
    )
    verdict = failed if soft < MIN_FILES else warned
    return verdict(name, f"A process may open {soft:,} files; shards, sockets and loader processes want {GOOD_FILES:,}.", remedy)


def locked_memory(*, nvme: bool) -> Finding:
    """How much memory may be locked: pinned buffers of NVMe offload and of RDMA are."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    rdma = any(Path("/sys/class/infiniband").glob("*"))
    return judge_locked_memory(soft, exempt=_may_lock(), needed_by=[what for what, used in (("NVMe offload", nvme), ("InfiniBand", rdma)) if used])


def judge_locked_memory(soft: int, *, exempt: bool, needed_by: list[str]) -> Finding:
    """The verdict on the limit of locked memory, in bytes.

    Args:
        soft: the limit.
        exempt: whether this process is above it.
        needed_by: what of this machine or run locks memory.
    """
    name = "locked memory"
    if exempt or soft == resource.RLIM_INFINITY:
        return passed(name, "no limit")
    if not needed_by or soft >= 1 << 30:
        return passed(name, f"{format_bytes(soft)}; nothing here locks more")
    elsewhere = "docker run --ulimit memlock=-1; Slurm: PropagateResourceLimitsExcept=MEMLOCK"
    remedy = f"ulimit -l unlimited   (as root: `* - memlock unlimited` in /etc/security/limits.conf; {elsewhere})"
    return warned(name, f"Only {format_bytes(soft)} may be locked, and {' and '.join(needed_by)} locks its buffers.", remedy)


def _may_lock() -> bool:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    effective = next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> CAP_IPC_LOCK & 1)


def own_name(*, hosts: int) -> Finding:
    """What this machine's own name means to itself: gloo and MPI listen there."""
    name = socket.gethostname()
    try:
        addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None)})
    except OSError:
        addresses = []
    chosen = os.environ.get("GLOO_SOCKET_IFNAME") or _in_environment_files("GLOO_SOCKET_IFNAME")
    return judge_own_name(name, addresses, hosts=hosts, interfaces=[other for _, other in socket.if_nameindex()], chosen=chosen)


def judge_own_name(host: str, addresses: list[str], *, hosts: int, interfaces: list[str], chosen: str) -> Finding:
    """The verdict on a host's name.

    Args:
        host: the name.
        addresses: what it resolves to.
        hosts: that will train together.
        interfaces: of this machine.
        chosen: GLOO_SOCKET_IFNAME, which is asked before the name.
    """
    check, others = "own name", [name for name in interfaces if name != "lo"]
    if chosen and chosen not in interfaces:
        return failed(
            check,
            f"GLOO_SOCKET_IFNAME={chosen} is no interface of this machine.",
            f"export GLOO_SOCKET_IFNAME={others[0] if others else 'lo'}   (there are: {', '.join(interfaces)})",
        )
    loopback = [address for address in addresses if address.startswith("127.") or address == "::1"]
    means = f"{host} is {', '.join(addresses)}" if addresses else f"{host} has no address"
    if hosts < 2 or (chosen and chosen != "lo"):
        return passed(check, f"{means}; {f'gloo uses {chosen}' if chosen else 'one host meets on loopback'}")
    if addresses and not loopback:
        return passed(check, means)
    if not others:
        return failed(check, f"{means}, and this machine has no network.", "ip address   shows its interfaces; ip link set eth0 up")
    remedy = f"export GLOO_SOCKET_IFNAME={others[0]}   (also a line of .deepspeed_env), or give {host} its network address in /etc/hosts"
    # `harness launch` chooses the interface by itself (harness/launch/interface.py).
    return warned(check, f"{means}: under other launchers than `harness launch` ranks cannot meet there, and the job dies half-way.", remedy)


def disk(folder: Path) -> Finding:
    """Room and permission to write where the run will keep what it makes; `folder` need not exist yet."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    return _disk(folder, there)


def _disk(folder: Path, there: Path) -> Finding:
    name = "disk"
    if not there.is_dir():
        return failed(name, f"{there} is a file, so {folder} cannot be made.", f"mv {there} {there}.old   (or set run_dir to another folder)")
    if not os.access(there, os.W_OK | os.X_OK):
        return failed(name, f"{there} cannot be written.", f"chown {os.getuid()} {there}   (or set run_dir to another folder)")
    state = os.statvfs(there)
    free = state.f_bavail * state.f_frsize
    seen = f"{folder}: {format_bytes(free)} free"
    remedy = f"df -h {there}: free some room, or set run_dir to a folder on a larger disk."
    if free < MIN_DISK_BYTES:
        return failed(name, f"{seen}.", remedy)
    if state.f_files and state.f_favail < 1000:
        return failed(
            name, f"{folder}: room for only {state.f_favail} more files.", f"df -i {there}: remove files, or set run_dir to a folder on another disk."
        )
    return warned(name, f"{seen}: a checkpoint takes 12 bytes a parameter.", remedy) if free < GOOD_DISK_BYTES else passed(name, seen)


def memory() -> Finding:
    """What of the physical memory a process here may have."""
    machine = psutil.virtual_memory()
    return judge_memory(machine.total, machine.available, cgroup_limit())


def judge_memory(physical: int, available: int, limit: int | None) -> Finding:
    """The verdict on the memory of a host, in bytes; `limit` is that of the control group, None without one."""
    name = "host memory"
    seen = f"{format_bytes(available)} available of {format_bytes(physical)}"
    if limit is not None and limit < physical:
        seen += f", of which the control group allows {format_bytes(limit)}"
        if limit < physical / 2:
            return warned(
                name,
                f"{seen}: beyond it ranks are killed (code -9).",
                "Raise the limit: docker run --memory, Kubernetes resources.limits.memory, Slurm --mem=0.",
            )
    if available < MIN_MEMORY_BYTES:
        return warned(name, f"{seen}.", "ps -eo pid,rss,args --sort=-rss | head   shows who has it.")
    return passed(name, seen)


def cgroup_limit(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> int | None:
    """The smallest memory limit of this process's control group and those above it, in bytes; versions 2 and 1."""
    try:
        lines = [line.split(":", 2) for line in groups.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    limits = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and "memory" not in controllers.split(","):
            continue
        top, file = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        place = top / path.strip("/")
        for folder in [place, *place.parents]:
            if folder.is_relative_to(top) and (text := _first_line(folder / file)).isdigit():
                limits.append(int(text))
    return min(limits, default=None)


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def environment_file() -> Finding:
    """.deepspeed_env, which DeepSpeed's launcher splits at `=` line by line and dies of any other line."""
    name, present = "environment file", _environment_files()
    for file in present:
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if "=" not in line:
                return failed(
                    name,
                    f"{file}:{number} is not NAME=value ({line.strip() or 'a blank line'}): DeepSpeed's launcher dies of it.",
                    f"sed -i {number}d {file}",
                )
    return passed(name, ", ".join(map(str, present))) if present else skipped(name, "no .deepspeed_env")


def _environment_files() -> list[Path]:
    """Where DeepSpeed's launcher reads variables for other hosts (deepspeed/launcher/runner.py)."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    return [file for file in dict.fromkeys((Path.home() / name, Path.cwd() / name)) if file.is_file()]


def _in_environment_files(variable: str) -> str:
    lines = [line for file in _environment_files() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line.partition("=")[2] for line in reversed(lines) if line.startswith(f"{variable}=")), "")
