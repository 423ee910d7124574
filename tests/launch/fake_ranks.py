"""Stand-ins for what `harness launch` starts: ranks that do what a test asks, and a launcher like DeepSpeed's that signals nobody."""

from __future__ import annotations

from pathlib import Path

RANK = """
import json, os, signal, sys, time
from pathlib import Path
run_dir, manner = Path(sys.argv[2]), sys.argv[3]
rank = os.environ["RANK"]
asked = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: asked.append(number))
facts = {"pid": os.getpid(), "port": os.environ["MASTER_PORT"], "world": os.environ["WORLD_SIZE"]}
(run_dir / f"up-{rank}").write_text(json.dumps(facts))
if manner == "work":
    while not asked:
        time.sleep(0.02)
    (run_dir / f"asked-{rank}").write_text(str(time.time()))
    time.sleep(0.5)
code = {"work": 75, "refuse": 2, "done": 0, "crash": 9}[manner]
if rank == "0" and manner != "crash":
    outcome = {"state": "x", "code": code, "reason": "", "step": 1, "attempt": 1, "time": time.time(), "version": 1}
    (run_dir / "outcome.json").write_text(json.dumps(outcome))
time.sleep(0.2)
sys.exit(code)
"""

LAUNCHER = """
import os, subprocess, sys, time
if "--late" in sys.argv:
    sys.argv.remove("--late")
    time.sleep(60)
environment = os.environ | {"WORLD_SIZE": "2", "MASTER_PORT": "0"}
command = [sys.executable, "-u", "-m", "harness", "train", *sys.argv[1:]]
ranks = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}) for rank in range(2)]
codes = [rank.wait() for rank in ranks]
sys.exit(max(codes) % 256)
"""


def write(folder: Path) -> Path:
    """Put a package `harness` that is a rank, and a launcher, into `folder`; gives the launcher."""
    package = folder / "harness"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(RANK)
    (folder / "launcher.py").write_text(LAUNCHER)
    return folder / "launcher.py"
