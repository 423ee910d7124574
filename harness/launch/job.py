"""A job as a value: its hosts, the ranks of each, where they meet, and what a rank finds in its environment."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Node:
    """One host of a job, and what runs there.

    Attributes:
        words: of the run: run file and overrides.
        slots: ranks of every host of the job, in order.
        node: which of them this is.
        master: where the ranks meet.
        port: there.
        environment: variables that every rank needs, besides those of this process.
        silence_s: longest silence of a rank; None learns it.
    """

    words: tuple[str, ...]
    slots: tuple[int, ...] = (1,)
    node: int = 0
    master: str = "127.0.0.1"
    port: int = 29500
    environment: dict[str, str] = field(default_factory=dict)
    silence_s: float | None = None

    @property
    def is_alone(self) -> bool:
        """Whether the job has no other host."""
        return len(self.slots) == 1

    @property
    def ranks(self) -> int:
        """Of this host."""
        return self.slots[self.node]

    @property
    def first_rank(self) -> int:
        """The first of this host."""
        return sum(self.slots[: self.node])

    def variables(self, local_rank: int) -> dict[str, str]:
        """What a rank knows of its place, in the names that torch and DeepSpeed read."""
        return self.environment | {
            "RANK": str(self.first_rank + local_rank), "WORLD_SIZE": str(sum(self.slots)), "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.ranks), "LOCAL_SIZE": str(self.ranks), "CROSS_RANK": str(self.node), "CROSS_SIZE": str(len(self.slots)),
            "MASTER_ADDR": self.master, "MASTER_PORT": str(self.port),
        }
