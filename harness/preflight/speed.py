"""How fast are this machine's NVMe and memory: measured on 256 MiB, in seconds."""

from __future__ import annotations

import errno
import mmap
import os
import time
import uuid
from pathlib import Path

from harness.preflight.findings import Finding, failed, passed, skipped, warned
from harness.units import format_bytes

TRIAL_BYTES, BLOCK_BYTES = 256 << 20, 8 << 20
SLOW_NVME, SLOW_MEMORY = 500e6, 1e9
"""Bytes a second. An NVMe drive reads 2 to 7 GB/s; below half a GB/s it is a network disk, or shared."""
NOT_LOCAL = {"nfs", "nfs4", "cifs", "lustre", "ceph", "fuse", "tmpfs", "overlay"}


def nvme(folder: str | None, *, speeds: dict[str, float]) -> Finding:
    """`engine.nvme_dir` can be written past the page cache, as DeepSpeed does, and fast.

    Args:
        folder: as set; None when the run offloads nothing to NVMe.
        speeds: gets nvme_write and nvme_read, bytes a second.
    """
    name = "NVMe"
    if folder is None:
        return skipped(name, "engine.nvme_dir is not set")
    place = Path(folder)
    if not place.is_dir():
        return failed(name, f"There is no folder {place}.", f"mkdir -p {place}   on a local NVMe drive, or set engine.nvme_dir")
    try:
        write, read, direct = measure_disk(place)
    except OSError as error:
        return failed(
            name,
            f"{place} cannot be written: {os.strerror(error.errno or 0)}.",
            f"df -h {place}; chown {os.getuid()} {place}   or set engine.nvme_dir to a folder on a local NVMe drive",
        )
    speeds |= {"nvme_write": write, "nvme_read": read}
    seen = f"{place}: {format_bytes(write)}/s written, {format_bytes(read)}/s read"
    kind = filesystem(place)
    if kind in NOT_LOCAL:
        return warned(
            name, f"{seen}, on {kind}, which is no local drive.", "Set engine.nvme_dir to a folder on a local NVMe drive (df -T shows them)."
        )
    if not direct:
        return warned(
            name,
            f"{seen}; the file system refuses O_DIRECT, which DeepSpeed's NVMe operator uses.",
            "Set engine.nvme_dir to a folder on ext4 or xfs.",
        )
    if min(write, read) < SLOW_NVME:
        return warned(
            name,
            f"{seen}: slow for an NVMe drive, and offload waits for it.",
            "Look for what else uses it (iostat -x 1), or set engine.nvme_dir to another drive.",
        )
    return passed(name, seen)


def measure_disk(folder: Path) -> tuple[float, float, bool]:
    """Write and read a file of TRIAL_BYTES in `folder`.

    Returns:
        bytes a second written and read, and whether that was past the page cache.

    Raises:
        OSError: when it cannot be written.
    """
    path = folder / f".harness-doctor-{uuid.uuid4().hex}"
    try:
        try:
            return *_trial(path, os.O_DIRECT), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return *_trial(path, 0), False
    finally:
        path.unlink(missing_ok=True)


def _trial(path: Path, flag: int) -> tuple[float, float]:
    with mmap.mmap(-1, BLOCK_BYTES) as block:  # aligned, as O_DIRECT asks
        block.write(os.urandom(1 << 20) * (BLOCK_BYTES >> 20))
        spent = []
        for mode in (os.O_WRONLY | os.O_CREAT | os.O_TRUNC, os.O_RDONLY):
            descriptor = os.open(path, mode | flag, 0o600)
            try:
                started = time.perf_counter()
                for _ in range(TRIAL_BYTES // BLOCK_BYTES):
                    done = os.write(descriptor, block) if mode & os.O_WRONLY else os.readv(descriptor, [block])
                    if done != BLOCK_BYTES:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if mode & os.O_WRONLY:
                    os.fsync(descriptor)
                spent.append(time.perf_counter() - started)
            finally:
                os.close(descriptor)
    return TRIAL_BYTES / spent[0], TRIAL_BYTES / spent[1]


def filesystem(folder: Path) -> str:
    """The kind of file system that `folder` is on, such as ext4; empty when unknown."""
    there, best = str(folder.resolve()), ("", "")
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for _, point, kind, *_ in (line.split() for line in lines):
        if (there == point or there.startswith(point.rstrip("/") + "/")) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1].partition(".")[0]


def memory(*, speeds: dict[str, float]) -> Finding:
    """How fast one core copies memory, the best of five; an offloaded optimizer lives on it.

    Args:
        speeds: gets memory_copy, bytes a second.
    """
    import numpy

    name = "memory bandwidth"
    try:
        source = numpy.ones(TRIAL_BYTES, numpy.uint8)
        target = numpy.zeros_like(source)
    except MemoryError:
        return failed(
            name,
            f"There is no memory for two arrays of {format_bytes(TRIAL_BYTES)}.",
            "ps -eo pid,rss,args --sort=-rss | head   shows who has it; ulimit -v unlimited",
        )
    spent = []
    for _ in range(5):
        started = time.perf_counter()
        numpy.copyto(target, source)
        spent.append(time.perf_counter() - started)
    speeds["memory_copy"] = TRIAL_BYTES / min(spent)
    seen = f"one core copies {format_bytes(speeds['memory_copy'])}/s"
    if speeds["memory_copy"] < SLOW_MEMORY:
        return warned(
            name,
            f"{seen}: offloaded optimizer states will be slow.",
            "Look for what else uses the machine (top), and for memory modules that are missing (dmidecode -t memory).",
        )
    return passed(name, seen)
