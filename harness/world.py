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
