"""The segments of shared memory through which DeepSpeed's ranks of a host talk; nobody but us takes their names away."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def forget(*, master: str, port: int | str, ranks: Iterable[int]) -> None:
    """Take away the names of some ranks' segments: what they have mapped lives on until the last of them ends.

    DeepSpeed's CPU communication (csrc/cpu/comm/shm.cpp) makes 66 MiB a rank in /dev/shm and never unlinks it, so that each run
    would keep that much of the host's memory until the host restarts.

    Args:
        master: where the ranks meet, as they were told it.
        port: there.
        ranks: of this host.
    """
    for rank in ranks:
        Path("/dev/shm", f"deepspeed_allreduce_buffer_{os.getuid()}_{master}_{port}_{rank}").unlink(missing_ok=True)
