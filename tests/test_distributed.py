"""How a rank leaves after an exception: at once, whatever the other ranks do."""

from __future__ import annotations

import subprocess
import sys

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


def test_a_rank_that_fails_waits_for_nobody():
    done = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 75 and done.stdout.endswith("said"), done.stderr
