"""Which rank this process is, read from what a launcher put into the environment."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass

_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
_WORLD_SIZE = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
_LOCAL_SIZE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_FIRST_PORT, _NUM_PORTS = 20000, 12000
"""Where the tasks of a Slurm step meet: below the ports that a kernel hands to connections, other steps elsewhere."""


@dataclass(frozen=True)
class World:
    """The place of this process among the ranks of a job.

    Attributes:
        rank: of this process.
        size: ranks of the job.
        local_rank: of this process on its host.
        local_size: ranks on its host.
        host: its name.
        is_placed: whether the launcher said which of its host's ranks this is.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = "localhost"
    is_placed: bool = True

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
    step = _step()
    size = _first(_WORLD_SIZE, step.size)
    local_rank = _first(_LOCAL_RANK, step.local_rank if step.is_placed else -1)
    local_size = _first(_LOCAL_SIZE, step.local_size if step.size > 1 else size)
    is_placed = size == 1 or local_rank >= 0
    return World(_first(_RANK, step.rank), size, max(0, local_rank), local_size, host=socket.gethostname(), is_placed=is_placed)


def _step() -> World:
    """What Slurm says of a task that `srun` started; what a launcher inside the task says goes before."""
    if not os.environ.get("SLURM_STEP_ID", "").isdigit() or "SLURM_PTY_PORT" in os.environ:  # in a shell of --pty it is the shell that is the task
        return World(is_placed=False)
    sizes = _tasks_per_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node, size = _first(("SLURM_NODEID",), 0), _first(("SLURM_STEP_NUM_TASKS",), 1)
    return World(
        rank=_first(("SLURM_PROCID",), 0), size=size, local_rank=_first(("SLURM_LOCALID",), 0), local_size=sizes[node] if node < len(sizes) else size,
        is_placed="SLURM_LOCALID" in os.environ,
    )


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's `8(x2),4` is 8, 8, 4."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def meeting_place() -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT for the tasks of a Slurm step, the same in all of them; empty under launchers that know better."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    if _step().size == 1 or not nodes or any(name in os.environ for name in ("MASTER_ADDR", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALRANKID")):
        return {}
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0] if first else nodes)
    number = _first(("SLURM_JOB_ID",), 0) * 20 + _first(("SLURM_STEP_ID",), 0)
    return {"MASTER_ADDR": host, "MASTER_PORT": os.environ.get("MASTER_PORT", str(_FIRST_PORT + number % _NUM_PORTS))}
