"""How files of a checkpoint come to the disks that lack them: where the new shape needs slices that another host wrote."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from harness import distributed
from harness.checkpoint.disks import Disks
from harness.checkpoint.read import SliceReader
from harness.errors import Failure
from harness.formats.manifest import FILE_NAME, Manifest, SliceFile, parts
from harness.log import say
from harness.units import format_bytes

if TYPE_CHECKING:
    from harness.engine.holdings import Slice

BLOCK_BYTES = 32 << 20


@contextmanager
def reading(found: tuple[Path, Manifest], wanted: Iterable[Slice], disks: Disks) -> Iterator[SliceReader]:
    """A reader of a checkpoint that `newest` chose, to which the files that this disk lacks were brought. Collective.

    Args:
        found: folder and manifest.
        wanted: what this rank will read.
        disks: which ranks share the run's folder.

    Raises:
        Failure: on all ranks, when a file could not be brought.
    """
    folder, manifest = found
    reader = SliceReader(folder, manifest)
    moves = [] if disks.is_one else _moves(folder, manifest, reader.files(wanted), disks)
    if not moves:
        yield reader
        reader.close()
        return
    fetched = folder.with_name(f"{folder.name}.fetched")
    _fetch(moves, folder, fetched, disks)
    reader = SliceReader(folder, manifest, fetched)
    yield reader
    reader.close()
    distributed.barrier()
    if disks.is_leader:
        shutil.rmtree(fetched, ignore_errors=True)


Move = tuple[SliceFile, int, int]
"""A file, and the ranks from and to which it goes."""


def _moves(folder: Path, manifest: Manifest, files: set[str], disks: Disks) -> list[Move]:
    """Every file that a disk needs and lacks. Collective; the same on all ranks."""
    here = parts(folder, manifest) if disks.is_leader and (folder / FILE_NAME).is_file() else set()
    answers = distributed.gather_objects((files, here))
    needed: dict[int, set[str]] = {leader: set() for leader in disks.order}
    for rank, (names, _) in enumerate(answers):
        needed[disks.leaders[rank]] |= names
    return [
        (entry, next(rank for rank in disks.order if entry.disk in answers[rank][1]), leader)
        for entry in manifest.files for leader in disks.order
        if entry.file in needed[leader] and entry.disk not in answers[leader][1]
    ]


def _fetch(moves: list[Move], folder: Path, fetched: Path, disks: Disks) -> None:
    """Bring files to the disks that lack them, block by block, and hold them to their digests."""
    mine = sum(entry.bytes for entry, _, to in moves if to == disks.rank)
    problems = _together(lambda: _make_place(fetched, mine)) if mine else _together(None)
    if not problems:
        for to in sorted({to for _, _, to in moves}):
            files = [entry for entry, _, receiver in moves if receiver == to]
            say(f"{folder.name}: {len(files)} files, {format_bytes(sum(entry.bytes for entry in files))}, are brought to {disks.name(disks.number_of(to))}.")
        told = [_move(move, folder, fetched, disks.rank) for move in moves if disks.rank in move[1:]]
        problems = [text for texts in distributed.gather_objects(told) for text in texts if text]
    if problems:
        raise Failure("Files of the checkpoint could not be brought to the disks that need them:\n  " + "\n  ".join(problems[:5]))


def _together(action: Callable[[], str] | None) -> list[str]:
    """Run what only some ranks have to do; what went wrong anywhere, on all of them."""
    problem = ""
    try:
        if action is not None:
            problem = action()
    except OSError as error:
        problem = str(error)
    return [text for text in distributed.gather_objects(problem) if text]


def _make_place(fetched: Path, num_bytes: int) -> str:
    shutil.rmtree(fetched, ignore_errors=True)
    fetched.mkdir(parents=True)
    free = shutil.disk_usage(fetched).free
    return "" if free > num_bytes else f"{format_bytes(num_bytes)} are needed in {fetched}, where {format_bytes(free)} are free"


def _move(move: Move, folder: Path, fetched: Path, rank: int) -> str:
    """Send or receive one file; whatever goes wrong, as many blocks are exchanged as were promised. Answers with what did."""
    entry, source, to = move
    return _send(folder / entry.file, entry, to) if rank == source else _receive(fetched / entry.file, entry, source)


def _blocks(num_bytes: int) -> list[int]:
    return [min(BLOCK_BYTES, num_bytes - begin) for begin in range(0, num_bytes, BLOCK_BYTES)]


def _send(path: Path, entry: SliceFile, to: int) -> str:
    problem, stream = "", None
    for size in _blocks(entry.bytes):
        block = b""
        try:
            stream = stream or open(path, "rb")
            block = stream.read(size)
        except OSError as error:
            problem = f"{path.name} cannot be read: {error}"
        distributed.send_bytes(block.ljust(size, b"\0"), to)
    if stream is not None:
        stream.close()
    return problem


def _receive(path: Path, entry: SliceFile, source: int) -> str:
    problem, state, stream = "", hashlib.blake2b(digest_size=16), None
    for size in _blocks(entry.bytes):
        block = distributed.receive_bytes(size, source)
        state.update(block)
        try:
            stream = stream or open(path, "wb")
            stream.write(block)
        except OSError as error:
            problem = f"{path.name} cannot be written: {error}"
    if stream is not None:
        stream.close()
    if not problem and state.hexdigest() != entry.digest:
        problem = f"{path.name} did not arrive as it was written"
    return problem
