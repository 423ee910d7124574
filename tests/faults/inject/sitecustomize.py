"""Python runs this at the start of every process of a run under test: it arms one rank for one moment of its own.

The variable FAULT holds `rank:phase:step:manner:folder`. When that rank marks that phase of that step, the file `folder/struck` appears and
the rank does what `manner` says: `hold` until there is a file `folder/go`, `kill` itself in every attempt, `nan` into its next forward,
or let its `data` thread die without a word. All but `kill` happen once.
"""

import os
import sys
from pathlib import Path


def _is_rank() -> bool:
    words = sys.orig_argv
    return any(words[place : place + 3] == ["-m", "harness", "train"] for place in range(len(words)))


def _arm() -> None:
    rank, phase, step, manner, folder = os.environ["FAULT"].split(":", 4)
    struck, go = Path(folder, "struck"), Path(folder, "go")
    if os.environ.get("RANK") != rank or (struck.exists() and manner != "kill"):
        return
    from harness import heartbeat

    real = heartbeat.mark
    armed = [True]

    def mark(now, at=None):
        real(now, at)
        if armed and now == phase and heartbeat._PULSE._step == int(step):
            armed.clear()
            struck.touch()
            _MANNERS[manner](go)

    heartbeat.mark = mark


def _hold(go: Path) -> None:
    import time

    while not go.exists():
        time.sleep(0.01)


def _kill(go: Path) -> None:
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def _nan(go: Path) -> None:
    from torch.nn import functional

    real = functional.embedding

    def embedding(*args, **kwargs):
        functional.embedding = real
        return real(*args, **kwargs) * float("nan")

    functional.embedding = embedding


def _end_data(go: Path) -> None:
    from harness.data.loader import TrainLoader

    def put(self, item):
        raise SystemExit  # ends the thread, and nobody hears of it

    TrainLoader._put = put


_MANNERS = {"hold": _hold, "kill": _kill, "nan": _nan, "data": _end_data}

if "FAULT" in os.environ and _is_rank():
    _arm()
