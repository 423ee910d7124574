"""DeepSpeed's CPU communication leaves nothing of the host's memory behind."""

from __future__ import annotations

import os
from pathlib import Path


def segments() -> list[str]:
    """On a rank, inside the process group: which segments of its rendezvous still have a name, and which it has mapped."""
    pattern = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_*"
    mapped = sum("deepspeed_allreduce_buffer" in line for line in Path("/proc/self/maps").read_text().splitlines())
    return [*(path.name for path in Path("/dev/shm").glob(pattern)), f"mapped {mapped}"]


def test_shared_memory_has_no_name_once_the_ranks_have_met(ranks2):
    assert ranks2.run(segments) == [["mapped 2"], ["mapped 2"]]
