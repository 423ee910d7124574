"""Ranks whose peers never come are lost, and say who was there; a port that is taken is no peer's doing; a rank that fails waits for nobody."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from harness.launch.local import free_port

RANK = """
import sys
from harness import distributed
from harness.world import World
try:
    distributed.init(World(rank=int(sys.argv[1]), size=2, local_size=1), use_gpu=False, timeout_minutes=1 / 60)
except Exception as error:
    print(type(error).__name__, error)
"""
LEAVE = """
import atexit, time
import torch.distributed as dist
from harness import distributed, world

distributed.init(world.current(), use_gpu=False, timeout_minutes=1)
atexit.register(time.sleep, 60)  # what is taken down with the interpreter, where a group over NCCL waits for its other ranks
dist.get_backend, distributed.size = lambda: "nccl", lambda: 2
dist.destroy_process_group = lambda: time.sleep(60)
distributed.abandon(75)
print("said", end="")
raise SystemExit(75)
"""


@pytest.mark.slow
def test_peers_that_never_come_are_lost_and_a_taken_port_is_not():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        cases = [(0, free_port()), (1, free_port()), (0, taken.getsockname()[1])]
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
        alone = [
            subprocess.Popen([sys.executable, "-c", RANK, str(rank)], env=environment | {"MASTER_PORT": str(port)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            for rank, port in cases
        ]
        waiting, seeking, refused = (one.communicate(timeout=100)[0].splitlines()[-1] for one in alone)
    assert waiting.startswith(f"PeerLost Of 2 ranks only 1 came to 127.0.0.1:{cases[0][1]} within "), waiting
    assert seeking.startswith(f"PeerLost Rank 1 did not meet the other 1 at 127.0.0.1:{cases[1][1]} within "), seeking
    assert refused.startswith("DistNetworkError") and "EADDRINUSE" in refused, refused


def test_a_rank_that_fails_waits_for_nobody():
    done = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 75 and done.stdout.endswith("said"), done.stderr
