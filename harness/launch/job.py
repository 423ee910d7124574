"""A job as a value: its hosts, the ranks of each, where they meet, and what a rank finds in its environment."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.files import digest_text


@dataclass(frozen=True)
class Job:
    """What all starters of a job know.

    Attributes:
        words: of the run: run file and overrides.
        slots: ranks of every host, in order.
        master: where the ranks meet.
        port: there; the starters meet one above it.
    """

    words: tuple[str, ...]
    slots: tuple[int, ...] = (1,)
    master: str = "127.0.0.1"
    port: int = 29500

    @property
    def key(self) -> str:
        """A word that tells this job from others that use the same port."""
        return digest_text(*self.words, *map(str, self.slots), str(self.port))

    def command(self, node: int | None, *, python: str) -> tuple[str, ...]:
        """The node starter's words on a host; without a number it finds its own in its environment."""
        number = ("--node", str(node)) if node is not None else ()
        slots = ",".join(map(str, self.slots))
        return (python, "-m", "harness.launch.node", "--slots", slots, *number, "--meet", f"{self.master}:{self.port}", *self.words)


@dataclass(frozen=True)
class Node:
    """One host of a job, and what runs there.

    Attributes:
        job: the whole.
        number: which of its hosts this is.
        environment: variables that every rank needs, besides those of this process.
        silence_s: longest silence of a rank; None learns it.
    """

    job: Job
    number: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    silence_s: float | None = None

    @property
    def ranks(self) -> int:
        """Of this host."""
        return self.job.slots[self.number]

    @property
    def first_rank(self) -> int:
        """The first of this host."""
        return sum(self.job.slots[: self.number])

    def variables(self, local_rank: int) -> dict[str, str]:
        """What a rank knows of its place, in the names that torch and DeepSpeed read."""
        return self.environment | {
            "RANK": str(self.first_rank + local_rank), "WORLD_SIZE": str(sum(self.job.slots)), "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.ranks), "LOCAL_SIZE": str(self.ranks), "CROSS_RANK": str(self.number), "CROSS_SIZE": str(len(self.job.slots)),
            "MASTER_ADDR": self.job.master, "MASTER_PORT": str(self.job.port),
        }
