"""Stand-ins for ranks that do what a test asks, under the real node starter."""

from __future__ import annotations

import sys
from pathlib import Path

from harness.launch.run import LaunchPlan

RANK = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from harness import heartbeat
from harness.formats import outcome
run_dir, manner = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ["RANK"])
asked = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: asked.append(number))
if manner == "child":
    sleep = "import time; time.sleep(100)"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[2], sys.argv[1]])"
    subprocess.Popen([sys.executable, "-c", parent, str(run_dir), sleep], start_new_session=True)
facts = {"pid": os.getpid(), "parent": os.getppid(), "port": os.environ["MASTER_PORT"], "world": os.environ["WORLD_SIZE"], "local": os.environ["LOCAL_RANK"]}
(run_dir / f"up-{rank}").write_text(json.dumps(facts))
while not all((run_dir / f"up-{other}").is_file() for other in range(int(os.environ["WORLD_SIZE"]))):
    time.sleep(0.01)  # one that ends at once would have the others ended before they were up
def step(number):
    for phase in ("data", "forward", "backward", "reduce", "step"):
        heartbeat.mark(phase, number)
    time.sleep(0.02)
number = 0
while manner in ("work", "hang", "ignore") and (not asked or manner == "ignore"):
    number += 1
    step(number)
    if manner == "hang" and (number == 30 if rank == 1 else (run_dir / "hung").exists()):  # the other one waits for it
        heartbeat.mark("backward")
        (run_dir / "hung").touch()
        time.sleep(1000)
if manner == "work":
    (run_dir / f"asked-{rank}").write_text(str(time.time()))
    time.sleep(0.5)
if manner == "one-fails" and rank == 0:
    time.sleep(1000)
codes = {"work": 75, "refuse": 2, "done": 0, "child": 0, "crash": 9, "one-fails": 1, "segfault": 0}
if manner == "segfault" and rank == 1:
    os.kill(os.getpid(), signal.SIGSEGV)
if rank == 0 and manner not in ("crash", "segfault"):
    state = {"work": "stopped", "refuse": "refused"}.get(manner, "done")
    outcome.write_outcome(run_dir, outcome.Outcome(state, codes[manner], "told", 1, 1))
if manner == "one-fails":
    outcome.write_end(run_dir, rank, outcome.Outcome("failed", 1, "ValueError: of rank 1", 1, 1))
time.sleep(0.2)
sys.exit(codes[manner])
"""

STARTER = """
import sys, time
from pathlib import Path
from harness.launch import job, starter, verdict, wire
folder, manner, silence, slots, number, port = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4], int(sys.argv[5]), int(sys.argv[6])
starter.LINGER_S, wire.HEARD_S = 1.0, 3.0
node = job.Node(job.Job((str(folder), manner), tuple(map(int, slots.split(","))), port=port), number, silence_s=silence)
started = time.time()
own = starter.Starter(node, folder, command=(sys.executable, str(folder / "rank.py")))
final = verdict.settle(own.run(), folder, started=started, writes=number == 0)
own.leave(final)
sys.exit(final.code)
"""


def plan(folder: Path, manner: str, *, silence_s: float = 60.0, slots: str = "2", node: int = 0, port: int = 12345) -> LaunchPlan:
    """A plan for ranks that behave in a manner: work, hang, ignore, refuse, done, child, crash, one-fails, segfault."""
    (folder / "rank.py").write_text(RANK)
    (folder / "starter.py").write_text(STARTER)
    (folder / "attempts" / "0001" / "logs").mkdir(parents=True, exist_ok=True)
    words = (str(folder), manner, str(silence_s), slots, str(node), str(port))
    return LaunchPlan(((sys.executable, str(folder / "starter.py"), *words),), folder)
