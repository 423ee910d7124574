"""The cases of the fault matrix: what is struck, when, and what must follow; the table in launch/FAULTS.md is made of them."""

from __future__ import annotations

import signal
from dataclasses import dataclass

import pytest

KILL, STOP, TERM, SEGV = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGSEGV
DEAD_S, SILENCE_S = 10.0, 8.0
"""Bounds from a strike to its notice: of a dead rank, and the silence that is allowed to one that stands still."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the table.

    Attributes:
        name: of the row, and of the test's case.
        struck: what happens, and when.
        follows: what must be seen then.
        plain: belongs to the ten that `tests/run.sh` runs, one for each mechanism.
    """

    name: str
    struck: str
    follows: str
    plain: bool = False


@dataclass(frozen=True, kw_only=True)
class Lost(Case):
    """Ranks are struck while one is held at a moment of its own; `harness launch` starts the run again by itself.

    Attributes:
        rank: the one that is held.
        phase: in which it is held.
        step: of that phase.
        number: the signal; None leaves it held.
        ranks: that get it.
        manner: what the held rank does.
        reason: pattern of the reason in `events.jsonl`.
        within_s: bound from the strike to the notice.
        resumed: step of the checkpoint from which the next attempt goes on; 0 where it begins anew.
        words: settings of the run; a checkpoint that is written behind the training may come too late, and it begins anew.
    """

    rank: int
    phase: str
    step: int
    number: int | None = None
    ranks: tuple[int, ...] = ()
    manner: str = "hold"
    reason: str
    within_s: float = DEAD_S
    resumed: int
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Asked(Case):
    """The launcher is asked to stop while rank 1 is held; the same command then goes on."""

    phase: str
    step: int
    number: int


@dataclass(frozen=True, kw_only=True)
class Above(Case):
    """Something above the ranks is struck, named by the words in its command line; the same command then goes on.

    Attributes:
        launcher: `harness`, `deepspeed` or `torchrun`.
        victims: `launcher`, `starter` (what it starts, which starts the ranks) or `rank 1`.
        number: the signal.
        code: pattern of the launcher's own exit code; empty where it is not there to have one.
        state: of the outcome.
    """

    launcher: str
    victims: tuple[str, ...]
    number: int
    code: str = ""
    state: str = "stopped"


@dataclass(frozen=True, kw_only=True)
class Damage(Case):
    """A file of a run that was lost after step 12 is damaged before it goes on.

    Attributes:
        told: pattern of what is said of it, in the events of the next attempt.
        resumed: step of the checkpoint from which it goes on.
    """

    told: str = ""
    resumed: int = 5


@dataclass(frozen=True, kw_only=True)
class Boundary(Case):
    """A save, in one process, ends at the n-th call of functions of os, for every n.

    Attributes:
        functions: whose calls are the boundaries.
        before: whether it ends just before the call, else just after it.
        again: the step that is saved is there already.
    """

    functions: tuple[str, ...]
    before: bool = True
    again: bool = False


AGAIN = "started again by itself from step {}, same losses"
GOES_ON = "code 75, `stopped`; the same command goes on, same losses"
BOTH = (0, 1)

LOST = [
    Lost(name="rank-killed", plain=True, struck="kill -9 of rank 1, in a backward", follows=f"named with signal, phase and step; {AGAIN.format(5)}",
         rank=1, phase="backward", step=7, number=KILL, ranks=(1,), reason="Rank 1 on .* was ended by SIGKILL in phase backward of step 7",
         resumed=5),
    Lost(name="all-ranks-killed", struck="kill -9 of all ranks, in a forward", follows=AGAIN.format(5),
         rank=1, phase="forward", step=8, number=KILL, ranks=BOTH, reason="was ended by SIGKILL", resumed=5),
    Lost(name="rank-killed-meeting", struck="kill -9 of rank 1, before the ranks have met",
         follows="started again by itself from the start, same losses",
         rank=1, phase="meet", step=0, number=KILL, ranks=(1,), reason="Rank 1 on .* was ended by SIGKILL in phase meet", resumed=0),
    Lost(name="rank-killed-saving", struck="kill -9 of rank 0, in a save", follows=AGAIN.format(5),
         rank=0, phase="save", step=10, number=KILL, ranks=(0,), reason="Rank 0 on .* was ended by SIGKILL", resumed=5),
    Lost(name="rank-killed-writing-behind", struck="kill -9 of rank 0 while a checkpoint is written behind the training",
         follows="started again by itself, from step 5 or from the start, same losses",
         rank=0, phase="forward", step=6, number=KILL, ranks=(0,), reason="Rank 0 on .* was ended by SIGKILL", resumed=5,
         words=("checkpoint.asynchronous=true",)),
    Lost(name="rank-killed-evaluating", struck="kill -9 of rank 1, in an evaluation", follows=AGAIN.format(5),
         rank=1, phase="evaluate", step=10, number=KILL, ranks=(1,), reason="Rank 1 on .* was ended by SIGKILL", resumed=5),
    Lost(name="rank-crashes", struck="a segmentation fault of rank 1, in an optimizer step", follows=f"`failed` by name; {AGAIN.format(5)}",
         rank=1, phase="step", step=7, number=SEGV, ranks=(1,), reason="Rank 1 on .* was ended by SIGSEGV", resumed=5),
    Lost(name="rank-stopped", plain=True, struck="SIGSTOP of rank 1, in a forward; `launch.silence_seconds=8`",
         follows=f"named as standing still; {AGAIN.format(5)}",
         rank=1, phase="forward", step=7, number=STOP, ranks=(1,), reason="Rank 1 on .* stood still", within_s=SILENCE_S + 5, resumed=5),
    Lost(name="rank-hangs", struck="rank 1 sleeps for ever, in a backward; `launch.silence_seconds=8`",
         follows=f"named as silent, stacks of all; {AGAIN.format(5)}",
         rank=1, phase="backward", step=7, reason="Rank 1 on .* was silent", within_s=SILENCE_S + 5, resumed=5),
    Lost(name="data-thread-killed", struck="the thread that reads the data of rank 1 dies without a word",
         follows=f"`failed`, says so; {AGAIN.format(10)}",
         rank=1, phase="reduce", step=11, manner="data", reason="thread that reads the data", resumed=10),
]

ASKED = [
    Asked(name="term-first-step", plain=True, struck="SIGTERM in the first step", follows=GOES_ON, phase="forward", step=1, number=TERM),
    Asked(name="term-evaluating", struck="SIGTERM in an evaluation", follows=GOES_ON, phase="evaluate", step=10, number=TERM),
    Asked(name="term-generating", struck="SIGTERM while answers are generated", follows=GOES_ON, phase="generate", step=10, number=TERM),
    Asked(name="term-saving", struck="SIGTERM in a save", follows=GOES_ON, phase="save", step=5, number=TERM),
    Asked(name="term-waiting", struck="SIGTERM between two steps, before the rows are there", follows=GOES_ON, phase="data", step=7, number=TERM),
]

ABOVE = [
    Above(name="starter-killed", plain=True, struck="kill -9 of the node starter", follows=GOES_ON, launcher="harness", victims=("starter",),
          number=KILL, code="75"),
    Above(name="launch-killed", struck="kill -9 of `harness launch`", follows=GOES_ON, launcher="harness", victims=("launcher",), number=KILL),
    Above(name="launch-and-starter-killed", struck="kill -9 of `harness launch` and its starter at once", follows=GOES_ON,
          launcher="harness", victims=("launcher", "starter"), number=KILL),
    Above(name="deepspeed-runner-killed", plain=True, struck="kill -9 of `deepspeed`", follows=GOES_ON.replace("code 75, ", ""),
          launcher="deepspeed", victims=("launcher",), number=KILL),
    Above(name="deepspeed-runner-asked", struck="SIGTERM to `deepspeed`, which passes it on to nobody", follows=GOES_ON.replace("code 75, ", ""),
          launcher="deepspeed", victims=("launcher",), number=TERM),
    Above(name="deepspeed-launch-killed", struck="kill -9 of DeepSpeed's launch.py", follows=GOES_ON.replace("code 75, ", "`deepspeed` answers 0; "),
          launcher="deepspeed", victims=("starter",), number=KILL, code="0"),
    Above(name="deepspeed-rank-killed", struck="kill -9 of rank 1 under `deepspeed`",
          follows="`deepspeed` answers 75 or 247, as the rank that it finds gone first; `lost` or `stopped`; the same command goes on, same losses",
          launcher="deepspeed", victims=("rank 1",), number=KILL, code="75|247", state="lost|stopped"),
    Above(name="torchrun-killed", struck="kill -9 of `torchrun`", follows=GOES_ON.replace("code 75, ", ""), launcher="torchrun",
          victims=("launcher",), number=KILL),
]

PASSED_OVER = "passed over by name, kept as `*.damaged`; goes on from step 5, same losses"
DAMAGE = [
    Damage(name="truncated", plain=True, struck="a file of the newest checkpoint is cut short", follows=PASSED_OVER, told="bytes instead of"),
    Damage(name="bit-flipped", struck="a bit of a file of it is flipped", follows=PASSED_OVER, told="was changed since it was written"),
    Damage(name="missing", struck="a file of it is gone", follows=PASSED_OVER, told="is missing"),
    Damage(name="marker", struck="the marker `latest` points nowhere", follows="goes on from step 10, which holds; same losses", resumed=10),
    Damage(name="journals-cut",
           struck="the last lines of `metrics.jsonl` and `events.jsonl` and all of `outcome.json` are cut short, as by a power failure",
           follows="goes on from step 10, same losses; nothing but the cut lines is lost", resumed=10),
    Damage(name="all-damaged", struck="every checkpoint is damaged", follows="code 2, `refused`: it would begin anew",
           told="was changed since it was written", resumed=0),
]

HOLDS = "for every n the checkpoint before or the new one holds, and the next save succeeds"
BOUNDARIES = [
    Boundary(name="save-dies-before-sync", struck="a save ends before its n-th fsync", follows=HOLDS, functions=("fsync",)),
    Boundary(name="save-dies-after-sync", struck="a save ends after its n-th fsync", follows=HOLDS, functions=("fsync",), before=False),
    Boundary(name="save-dies-at-file", struck="a save ends before it opens its n-th file or makes its n-th folder", follows=HOLDS,
             functions=("open", "mkdir")),
    Boundary(name="save-dies-at-rename", plain=True, struck="a save ends before or after its n-th rename", follows=HOLDS,
             functions=("rename", "replace"), before=False),
    Boundary(name="save-dies-at-removal", struck="a save and the retention after it end at their n-th removal", follows=HOLDS,
             functions=("unlink", "rmdir", "rename", "replace")),
    Boundary(name="second-save-dies", struck="the second save of a step ends at any of these", follows=HOLDS,
             functions=("fsync", "rename", "replace", "unlink", "rmdir"), again=True),
]

NAN = Case(name="nan-on-one-rank", plain=True, struck="a NaN in the forward of rank 1 alone; `train.max_skipped_steps=1`",
           follows="code 3, `anomaly`, on all ranks; nothing of it is saved; goes on from step 5, same losses")
STDOUT = Case(name="stdout-closed", struck="the reader of the launcher's output goes away during a save",
              follows="trains on to its end, logs whole, same losses")
TWICE = Case(name="ctrl-c-one-of-two", struck="Ctrl-C to one of two `harness launch` on a machine",
             follows="that one: code 75, goes on to the same losses; the other: undisturbed, same losses")
TWICE_DEEPSPEED = Case(name="term-one-of-two-deepspeed", struck="SIGTERM to launch.py of one of two `deepspeed` commands on a machine",
                       follows="that one stops and goes on to the same losses; the other: undisturbed, same losses")
FULL_WRITE = Case(name="disk-full-writing", plain=True,
                  struck="the disk (a small tmpfs) becomes full while a file of a checkpoint is written, in one process",
                  follows="the save fails by name, leaves nothing; the one before holds; with room again the next save succeeds")
FULL_SAVE = Case(name="disk-full-saving", struck="the disk of the run (a small tmpfs) becomes full during a save, but for a few lines",
                 follows="trains on; code 1 at its end, \"The checkpoint of step 20 was not saved\"; with room again from step 5, same losses")
FULL_RUN = Case(name="disk-full", struck="the disk of the run (a small tmpfs) becomes full during a save, to the last byte",
                follows="code 1, \"No space left on device\"; with room again it goes on from step 5, same losses")
LOOP = Case(name="dies-every-time", struck="kill -9 of rank 1 in the first step of every attempt; `launch.restarts=1`",
            follows="code 1, `failed`: it ended twice in a row without a new checkpoint")
END = Case(name="killed-at-its-end", struck="kill -9 of rank 1 when all is done", follows="code 0, `done`")
PREPARE = Case(name="prepare-killed", plain=True, struck="kill -9 of all processes of a `harness prepare` at once",
               follows="nothing is left in /dev/shm; the next one makes the same bytes")
OPERATORS = Case(name="build-killed", struck="kill -9 of the rank that compiles operators",
                 follows="compilers are ended; started again by itself, compiles anew past the lock that was left, same losses")

SINGLE = [NAN, STDOUT, TWICE, TWICE_DEEPSPEED, FULL_WRITE, FULL_SAVE, FULL_RUN, LOOP, END, PREPARE, OPERATORS]
CASES: list[Case] = [*LOST, *ASKED, *ABOVE, *DAMAGE, *BOUNDARIES, *SINGLE]


def rows(*cases: Case) -> pytest.MarkDecorator:
    """Parametrises a test by cases; those that are not plain are slow."""
    found = [pytest.param(case, id=case.name, marks=[] if case.plain else [pytest.mark.slow]) for case in cases]
    return pytest.mark.parametrize("case", found)
