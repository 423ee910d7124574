"""Where a run will train, as far as its run file says: how many ranks, on how many hosts, and whether on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.config.load import Loaded
from harness.launch import hostfile, local


@dataclass(frozen=True)
class Place:
    """The ranks of a run.

    Attributes:
        ranks: all of them.
        local_ranks: of the fullest host.
        has_gpu: whether they train on GPUs.
        here: whether this machine's folders are those of the run.
    """

    ranks: int
    local_ranks: int
    has_gpu: bool
    here: bool


def where(loaded: Loaded, ranks: int | None = None) -> Place:
    """Nodes of `launch.slurm`, pods of `launch.kubernetes` or slots of a hostfile that make as many ranks as are wanted; else this machine.

    Args:
        loaded: the run file.
        ranks: that are wanted; by default `launch.ranks`.
    """
    wanted = ranks or loaded.run.launch.ranks
    gpus = 0 if loaded.run.engine.device == "cpu" else local.num_gpus()
    for number, each, here in _told(loaded):
        if wanted in (None, number):
            return Place(number, each, loaded.run.engine.device != "cpu", here)
    number = wanted or max(1, gpus)
    return Place(number, min(number, max(1, gpus or number)), gpus > 0, here=True)


def _told(loaded: Loaded) -> list[tuple[int, int, bool]]:
    """Ranks of each launcher that the run file gives hosts, of one host, and whether it looks at folders from here."""
    slurm, kubernetes, hosts = loaded.run.launch.slurm, loaded.run.launch.kubernetes, loaded.run.launch.hosts
    told = []
    if slurm.model_fields_set & {"nodes", "ranks_per_node"}:
        told.append((slurm.nodes * slurm.ranks_per_node, slurm.ranks_per_node, False))
    if kubernetes.model_fields_set & {"pods", "ranks_per_pod"}:
        told.append((kubernetes.pods * kubernetes.ranks_per_pod, kubernetes.ranks_per_pod, False))
    if hosts.file is not None:
        at = f"launch.hosts.file ({loaded.origin('launch.hosts.file')})"
        slots = hostfile.choose(hostfile.read_hostfile(Path(hosts.file), where=at), include=hosts.include, exclude=hosts.exclude, where=at)
        told.append((sum(slots.values()), max(slots.values()), True))
    return told
