"""What every peer of `benchmarks/data.py` answers: `convert` packed rows to its own format, `read` them and print what that took.

usage: PEER.py convert ROWS_NPY FOLDER
       PEER.py read FOLDER --batches K [--start-row N] [--seed S] [--workers W] [--state FILE] [--save-state FILE] [--hashes FILE]

It runs in the environment of each peer, so it needs numpy only. The clock starts when all imports of the peer are done.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import pickle
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BATCH, LENGTH = 32, 1024
MEMORY_SAMPLES = 16


@dataclass(frozen=True)
class Request:
    """What to read.

    Attributes:
        folder: as `convert` left it.
        start_row: rows read before.
        seed: of the order.
        workers: processes that read, for a peer that has them; 0 reads in this one.
        state: what `Reader.state` gave after `start_row` rows, in another process; None at the beginning of the epoch.
    """

    folder: Path
    start_row: int
    seed: int
    workers: int
    state: Any


class Reader(ABC):
    """One epoch of a peer, from a point on."""

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """int64 [at most 32, 1024] arrays or tensors, to the end of the epoch."""

    @abstractmethod
    def state(self) -> Any:
        """What another process needs to go on after the last batch; it can be pickled."""

    def close(self) -> None:
        """End threads and processes."""


def serve(convert: Callable[[Path, Path], None], open_reader: Callable[[Request], Reader], *, versions: tuple[str, ...]) -> None:
    """The command line of a peer.

    Args:
        convert: write the rows in the first file to the second, a folder.
        open_reader: construct whatever reads.
        versions: packages to report.
    """
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("convert")
    verb.add_argument("rows", type=Path)
    verb.add_argument("folder", type=Path)
    verb = verbs.add_parser("read")
    verb.add_argument("folder", type=Path)
    verb.add_argument("--batches", type=int, required=True)
    for name in ("--start-row", "--seed", "--workers"):
        verb.add_argument(name, type=int, default=0)
    for name in ("--state", "--save-state", "--hashes"):
        verb.add_argument(name, type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "convert":
        convert(arguments.rows, arguments.folder)
        return
    answer = read(open_reader, arguments)
    print(json.dumps(answer | {"versions": {name: importlib.metadata.version(name) for name in versions}}))


def read(open_reader: Callable[[Request], Reader], arguments: argparse.Namespace) -> dict[str, Any]:
    """Read, with or without hashes; the rate counts the batches after the first.

    Returns:
        first_batch_s: from the end of the imports to the first batch, objects constructed in between; None when there is no batch.
        tokens_per_s, cpu_s_per_mtokens: of the batches after the first, threads and processes of the peer included.
        peak_bytes, peak_anonymous_bytes: above what was resident after the imports; the second without pages of files.
        rows: read.
    """
    memory = Memory()
    started = time.perf_counter()
    state = pickle.loads(arguments.state.read_bytes()) if arguments.state else None  # written by this benchmark
    reader = open_reader(Request(arguments.folder, arguments.start_row, arguments.seed, arguments.workers, state))
    stream = reader.batches()
    if (batch := next(stream, None)) is None:
        return {"first_batch_s": None, "rows": 0}
    first_batch_s = time.perf_counter() - started
    check(batch)
    hashes = [row_hashes(batch)] if arguments.hashes else []
    rows, every = len(batch), max(1, arguments.batches // MEMORY_SAMPLES)
    memory.sample()
    begun, cpu = time.perf_counter(), cpu_s()
    later = 0
    for number in range(1, arguments.batches):
        if (batch := next(stream, None)) is None:
            break
        later += len(batch)
        if arguments.hashes:
            hashes.append(row_hashes(batch))
        if number % every == 0:
            memory.sample()
    wall = time.perf_counter() - begun
    memory.sample()
    if arguments.save_state:
        arguments.save_state.write_bytes(pickle.dumps(reader.state()))
    del stream
    reader.close()
    cpu = cpu_s() - cpu
    if arguments.hashes:
        np.save(arguments.hashes, np.concatenate(hashes))
    rates = {"tokens_per_s": later * LENGTH / wall, "cpu_s_per_mtokens": cpu / (later * LENGTH / 1e6)} if later else {}
    return {"first_batch_s": first_batch_s, "rows": rows + later, **rates, **memory.peaks()}


def check(batch: Any) -> None:
    """Raise unless a batch is what is compared."""
    if batch.shape[1] != LENGTH or len(batch) > BATCH or not str(batch.dtype).endswith("int64"):
        raise ValueError(f"a batch of {batch.dtype} {tuple(batch.shape)}")


def row_hashes(batch: Any) -> np.ndarray:
    """uint64 [rows]: what tells rows apart, whatever integers they are held in."""
    rows = np.asarray(batch).astype(np.uint16, copy=False)
    return np.asarray([int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little") for row in rows], np.uint64)


def cpu_s() -> float:
    """CPU seconds of this process with its threads, and of its children that ended."""
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


class Memory:
    """Resident memory above what it is at construction (Linux: proc(5))."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self._before, self._anonymous, self._workers = _status(), 0, 0

    def sample(self) -> None:
        """Look at what has no peak of its own: anonymous pages, and the processes of the peer."""
        self._anonymous = max(self._anonymous, _status()["RssAnon"])
        self._workers = max(self._workers, sum(_private_bytes(pid) for pid in _children()))

    def peaks(self) -> dict[str, int]:
        """Bytes above the beginning."""
        return {"peak_bytes": _status()["VmHWM"] - self._before["VmRSS"] + self._workers,
                "peak_anonymous_bytes": self._anonymous - self._before["RssAnon"] + self._workers}


def _status() -> dict[str, int]:
    fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields if field[-1] == "kB"}


def _children() -> list[int]:
    return [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]


def _private_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
