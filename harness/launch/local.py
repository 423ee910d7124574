"""A run on this machine: the node starter's command as a value, and a port for the ranks to meet on."""

from __future__ import annotations

import random
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.config.load import Loaded
from harness.errors import Refused
from harness.launch.operators import num_gpus
from harness.launch.run import LaunchPlan

__all__ = ["free_port", "num_gpus", "num_ranks", "plan", "render"]
FIRST_PORT = 20000


def num_ranks(loaded: Loaded) -> int:
    """As many ranks as the run file asks for, else as this machine has GPUs."""
    return loaded.run.launch.ranks or max(1, 0 if loaded.run.engine.device == "cpu" else num_gpus())


def plan(loaded: Loaded, *, run_file: str, overrides: Sequence[str]) -> LaunchPlan:
    """The node starter's command for this machine."""
    gpus = 0 if loaded.run.engine.device == "cpu" else num_gpus()
    command = render(ranks=num_ranks(loaded), port=free_port(), run_file=run_file, overrides=overrides)
    return LaunchPlan((command,), loaded.run.run_path, {} if gpus else {"DS_ACCELERATOR": "cpu"})


def render(*, ranks: int, port: int, run_file: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """The words of the command.

    Args:
        ranks: processes on this machine.
        port: where they meet.
        run_file: path of the run file.
        overrides: `key.path=value` words.
    """
    return (sys.executable, "-m", "harness.launch.node", "--slots", str(ranks), "--meet", f"127.0.0.1:{port}", run_file, *overrides)


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel hands to connections: it stays free until the ranks are up."""
    try:
        end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    except OSError:
        end = 32768
    choices = [*random.SystemRandom().sample(range(FIRST_PORT, end), 50)] if end - FIRST_PORT > 50 else []
    for port in [*choices, 0]:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise Refused(
        "No free port was found for the ranks to meet on.",
        where="this host",
        remedy="End what listens, or widen net.ipv4.ip_local_port_range.",
    )
