"""Which ranks share a disk for the run's folder: all, where it is one machine's or a shared file system; else those of a host."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from harness import distributed
from harness.errors import Failure, Refused
from harness.files import write_text
from harness.formats.manifest import Manifest, absent_parts
from harness.world import World

PATIENCE_S = 2.0
POLL_S = 0.1


@dataclass(frozen=True)
class Disks:
    """The disks that hold a run's folder.

    Attributes:
        rank: this rank.
        leaders: for each rank, the lowest one that shares its disk.
        hosts: for each rank, the name of its host.
    """

    rank: int
    leaders: tuple[int, ...]
    hosts: tuple[str, ...]

    @classmethod
    def shared(cls, world: World) -> Disks:
        """One disk for all ranks."""
        return cls(world.rank, (0,) * world.size, (world.host,) * world.size)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The leaders; a disk's number is its leader's place among them."""
        return tuple(sorted(set(self.leaders)))

    @property
    def is_one(self) -> bool:
        """Whether all ranks share a disk."""
        return len(self.order) == 1

    @property
    def is_leader(self) -> bool:
        """Whether this rank acts for its disk."""
        return self.leaders[self.rank] == self.rank

    @property
    def number(self) -> int:
        """Of this rank's disk."""
        return self.number_of(self.rank)

    def number_of(self, rank: int) -> int:
        """The number of a rank's disk."""
        return self.order.index(self.leaders[rank])

    def name(self, number: int) -> str:
        """The hosts that share a disk."""
        leader = self.order[number]
        return ", ".join(dict.fromkeys(host for host, led in zip(self.hosts, self.leaders, strict=True) if led == leader))

    @property
    def names(self) -> tuple[str, ...]:
        """As a manifest has them: the hosts of each disk, or nothing when there is one disk."""
        return () if self.is_one else tuple(self.name(number) for number in range(len(self.order)))

    @property
    def share(self) -> float:
        """Of all ranks, those on this disk."""
        return self.leaders.count(self.leaders[self.rank]) / len(self.leaders)


def find(run_dir: Path, world: World) -> Disks:
    """Find out which ranks see the same folder. Collective; the folder must exist for every rank.

    Ranks of one host that see the same inode share it, without a look. Where there are several such parties, each leaves a token and
    looks for those of the others; a file system that shows another's file late is given `PATIENCE_S`.

    Raises:
        Failure: on all ranks, when one of them cannot write there.
    """
    answers = distributed.gather_objects((world.host, _party(run_dir, world), uuid.uuid4().hex))
    parties = [party for _, party, _ in answers]
    heads = [parties.index(party) for party in parties]
    seen = {head: {head} for head in heads}
    if len(seen) > 1:
        meeting = Path(run_dir) / "control" / f"disks-{answers[0][2]}"
        seen = _look(meeting, is_head=heads[world.rank] == world.rank, heads=set(heads), rank=world.rank)
    leaders = _leaders(seen)
    return Disks(world.rank, tuple(leaders[head] for head in heads), tuple(host for host, _, _ in answers))


def refuse_part(folder: Path, manifest: Manifest) -> None:
    """Refuse a checkpoint of which other hosts have files, where there is no one to ask for them.

    Raises:
        Refused: with the names of the hosts.
    """
    if absent := absent_parts(folder, manifest):
        hosts = ", ".join(manifest.disks[number] for number in sorted(absent))
        count = sum(entry.disk in absent for entry in manifest.files)
        raise Refused(
            f"{count} of the {len(manifest.files)} files of this checkpoint are on the disks of other hosts: {hosts}.", where=str(folder),
            remedy=f"Copy their checkpoints/{folder.name} folders together with this one into one folder.",
        )


def _party(run_dir: Path, world: World) -> tuple[str, ...]:
    """What two ranks have in common only if they surely see the same folder: host, boot, mounts, device and inode."""
    facts = [world.host]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/mnt"):
        try:
            facts.append(os.readlink(path) if os.path.islink(path) else Path(path).read_text(encoding="ascii").strip())
        except OSError:
            facts.append("")
    state = os.stat(run_dir)
    return (*facts, f"{state.st_dev}:{state.st_ino}")


def _look(meeting: Path, *, is_head: bool, heads: set[int], rank: int) -> dict[int, set[int]]:
    """Which parties each one sees."""
    problem = ""
    if is_head:
        try:
            _leave(meeting, rank)
        except OSError as error:
            problem = f"rank {rank} cannot write to {meeting.parent}: {error.strerror}"
    problems = [text for text in distributed.gather_objects(problem) if text]
    if problems:
        raise Failure("; ".join(problems[:3]))
    mine = _tokens(meeting, rank, heads) if is_head else set()
    seen = {head: mine for head, mine in enumerate(distributed.gather_objects(mine)) if head in heads}
    if is_head:
        shutil.rmtree(meeting, ignore_errors=True)
    return seen


def _leave(meeting: Path, rank: int) -> None:
    meeting.mkdir(parents=True, exist_ok=True)
    write_text(meeting / str(rank), "")


def _tokens(meeting: Path, rank: int, heads: set[int]) -> set[int]:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = {int(name) for name in os.listdir(meeting) if name.isdigit()} & heads
        if found == heads or time.monotonic() > deadline:
            return found
        time.sleep(POLL_S)
        _leave(meeting, rank)  # a change of its own makes a client of NFS ask the server for the list again


def _leaders(seen: dict[int, set[int]]) -> dict[int, int]:
    """The lowest of those that are connected by a sight, one way or through others."""
    leaders = {head: head for head in seen}
    for head, others in seen.items():
        joined = {leaders[other] for other in others | {head}}
        leaders = {other: min(joined) if leader in joined else leader for other, leader in leaders.items()}
    return leaders
