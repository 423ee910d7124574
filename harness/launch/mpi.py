"""A run under mpirun: MPI starts the ranks, and DeepSpeed's discovery through mpi4py tells them who they are."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

from harness.config.load import Loaded
from harness.errors import Refused
from harness.launch import hostfile, hosts
from harness.launch.local import free_port
from harness.launch.run import LaunchPlan

MPIRUN = "mpirun"


def plan(loaded: Loaded, chosen: Mapping[str, int], *, run_file: str, overrides: Sequence[str]) -> LaunchPlan:
    """The mpirun command; a request becomes SIGUSR1, the one signal that it passes on and then waits.

    Raises:
        Refused: there is no mpirun, or it is neither Open MPI nor MPICH.
    """
    settings, folder = loaded.run.launch.hosts, loaded.run.run_path.absolute() / "launch"
    chosen = dict(sorted(chosen.items(), key=lambda one: not _is_here(one[0])))  # Open MPI begins where it is started, if the hostfile has that host
    meet = {"MASTER_ADDR": settings.master or next(iter(chosen)), "MASTER_PORT": str(settings.port or free_port())}
    values = hosts.variables(loaded) | settings.environment | meet
    command = render(kind(), ranks=sum(chosen.values()), hosts=str(folder / "mpi-hosts"), names=list(values), run_file=run_file, overrides=overrides)
    text = hostfile.render(dict(chosen)) if kind() == "openmpi" else "".join(f"{name}:{slots}\n" for name, slots in chosen.items())
    return LaunchPlan((command,), loaded.run.run_path, values, request=signal.SIGUSR1, texts={folder / "mpi-hosts": text})


def _is_here(host: str) -> bool:
    """Whether a name leads to this machine."""
    with suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(address)  # the kernel gives no address of another machine
                return True
    return False


def kind() -> str:
    """Which MPI `mpirun` belongs to: openmpi or mpich.

    Raises:
        Refused: there is none, or another one.
    """
    program = shutil.which(MPIRUN)
    if program is None:
        raise Refused("mpirun is not on this machine.", where="--on mpi", remedy="Install Open MPI or MPICH, or use --on hosts.")
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    for words, name in (("Open MPI", "openmpi"), ("OpenRTE", "openmpi"), ("PRRTE", "openmpi"), ("HYDRA", "mpich"), ("Intel(R) MPI", "mpich")):
        if words.lower() in told.lower():
            return name
    raise Refused(f"What `{program} --version` says is unknown: {told.strip()[:200]}", where="--on mpi", remedy="Use Open MPI or MPICH, or --on hosts.")


def render(kind: str, *, ranks: int, hosts: str, names: Sequence[str], run_file: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """The words of the command.

    Args:
        kind: openmpi or mpich.
        ranks: over all hosts.
        hosts: path of a hostfile of that kind.
        names: variables that every rank gets, of those of mpirun: all users of a host see the words of commands.
        run_file: path of the run file.
        overrides: `key.path=value` words.
    """
    rank = (sys.executable, "-u", "-m", "harness", "train", run_file, *overrides)
    if kind == "mpich":
        return (MPIRUN, "-n", str(ranks), "-f", hosts, "-genvlist", ",".join(names), *rank)
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    exported = [word for name in names for word in ("-x", name)]
    return (MPIRUN, *root, "-n", str(ranks), "--hostfile", hosts, "--bind-to", "none", *exported, *rank)
