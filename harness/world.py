"""Which rank this process is, read from what a launcher put into the environment."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
_WORLD_SIZE = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
_LOCAL_SIZE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class World:
    """The place of this process among the ranks of a job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = "localhost"

    @property
    def is_main(self) -> bool:
        """True on the one rank that speaks."""
        return self.rank == 0


@dataclass(frozen=True)
class Grid:
    """Ranks as pipeline stages times data-parallel copies; neighbouring ranks share a stage, so that their reductions stay inside a host.

    The same layout as DeepSpeed's `PipeDataParallelTopology` (deepspeed/runtime/pipe/topology.py).

    Attributes:
        stages: stages of the pipeline; 1 where there is none.
        ranks: all ranks, a multiple of `stages`.
        rank: this one.
    """

    stages: int
    ranks: int
    rank: int

    @property
    def dp_size(self) -> int:
        """Data-parallel copies of each stage."""
        return self.ranks // self.stages

    @property
    def dp_rank(self) -> int:
        """Which copy this rank is."""
        return self.rank % self.dp_size

    @property
    def pp_stage(self) -> int:
        """Which stage this rank computes."""
        return self.rank // self.dp_size

    @property
    def is_first(self) -> bool:
        """Whether this rank takes the tokens in."""
        return self.pp_stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pp_stage == self.stages - 1

    def rank_of(self, pp_stage: int) -> int:
        """The rank that computes `pp_stage` in the same pipeline."""
        return pp_stage * self.dp_size + self.dp_rank


def _first(names: tuple[str, ...], default: int) -> int:
    for name in names:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return default


def current() -> World:
    """The world as the launcher described it; one rank of one when nothing did."""
    size = _first(_WORLD_SIZE, 1)
    return World(
        rank=_first(_RANK, 0),
        size=size,
        local_rank=_first(_LOCAL_RANK, 0),
        local_size=_first(_LOCAL_SIZE, size),
        host=socket.gethostname(),
    )
