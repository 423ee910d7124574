"""A run that something random happens to all the time, beside an undisturbed one: same losses, nothing left, no second unaccounted for.

    python tests/soak.py --minutes 30 [--every SECONDS] [--seed N]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

if __name__ == "__main__":
    REPOSITORY = str(Path(__file__).resolve().parents[1])
    sys.path.insert(0, REPOSITORY)
    os.environ["PYTHONPATH"] = f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)

from harness.checkpoint.shelf import committed
from harness.formats import ledger
from harness.formats.outcome import last_step
from harness.review.goodput import Goodput, goodput
from tests.end_to_end.faults import Running, evaluations, losses, running
from tests.soak_files import left_in_shared_memory, write_run_file

EVALUATE_EVERY, SAVE_EVERY = 50, 5
NEVER = 10_000_000
FAULTS = ("kill a rank", "stop a rank", "ask the launcher", "kill the starter", "damage", "ask by file", "kill the launcher")
AHEAD, NEAR = 400, 200
"""Steps by which the undisturbed run is ahead when it is paused, and when it goes on."""
STEP_SAID_S = 20.0
PATIENCE_S = 240.0
SHARE = 0.02
"""How much of the wall clock the ledger may leave unexplained."""


@dataclass
class Soak:
    """One soak.

    Attributes:
        folder: for the data and both runs.
        minutes: how long the run is disturbed.
        every_s: mean time between faults.
        seed: of what happens and when.
    """

    folder: Path
    minutes: float
    every_s: float
    seed: int
    done: list[str] = field(default_factory=list)
    starts: int = 0
    bag: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.run_dir, self.reference = self.folder / "run", self.folder / "reference"
        self._began_s = time.monotonic()
        self._damaged: Path | None = None
        self._said_s = 0.0
        self._launched = 0.0
        self._paused = False

    def run(self) -> Goodput:
        """Disturb a run for the minutes, let it end, and hold it against the other.

        Raises:
            AssertionError: when losses differ, something is left, or time is unaccounted for.
        """
        before = left_in_shared_memory()
        run_file = write_run_file(self.folder)
        words = [f"train.steps={NEVER}", f"evaluation.every_steps={EVALUATE_EVERY}"]
        quiet = [f"checkpoint.every_steps={EVALUATE_EVERY}", "launch.silence_seconds=100000"]
        with running(run_file, self.reference, *words, *quiet) as beside, self._paced(beside):
            end_s = time.monotonic() + 60 * self.minutes
            while time.monotonic() < end_s:
                with running(run_file, self.run_dir, *words, f"checkpoint.every_steps={SAVE_EVERY}") as it:
                    self.starts, self._launched = self.starts + 1, time.time()
                    self._disturb(it, beside, end_s)
                self._wait_until_gone()
            self._pace(beside, on=True)
            steps = EVALUATE_EVERY * (last_step(self.run_dir) // EVALUATE_EVERY + 1)
            self.say(f"the last start: to step {steps}")
            with running(run_file, self.run_dir, f"train.steps={steps}", words[1]) as it:
                assert it.end(timeout_s=PATIENCE_S) == 0, it.output[-5000:]
            self.say(f"the undisturbed run is at step {last_step(self.reference)}")
            beside.until(lambda: last_step(self.reference) >= steps + 1, timeout_s=60 * self.minutes + PATIENCE_S)
            beside.strike(signal.SIGTERM)
            beside.end(timeout_s=PATIENCE_S)
        self._compare(steps)
        left = left_in_shared_memory() - before
        assert not left, f"left in shared memory: {left}"
        return self._account()

    @contextmanager
    def _paced(self, beside: Running) -> Iterator[None]:
        """However it ends, the undisturbed run must hear that it is to end too."""
        try:
            yield
        finally:
            self._pace(beside, on=True)

    def _pace(self, beside: Running, *, on: bool) -> None:
        """Let the undisturbed run go on, or pause it: it would take the processors from the other for nothing."""
        if self._paused == on:
            self._paused = not on
            processes = [psutil.Process(beside.child.pid), *psutil.Process(beside.child.pid).children(recursive=True)]
            for process in reversed(processes) if on else processes:
                process.resume() if on else process.suspend()

    def _disturb(self, it: Running, beside: Running, end_s: float) -> None:
        """Strike one start of the run until it has ended, or the time is over and it is asked to."""
        due_s = time.monotonic() + self.random.expovariate(1.0 / self.every_s)
        struck_s = asked_s = 0.0
        while it.child.poll() is None:
            now_s = time.monotonic()
            if now_s >= end_s and not asked_s:
                asked_s = now_s
                it.strike(signal.SIGTERM)
            if now_s >= due_s and not asked_s:
                has_struck = self._strike(it)
                struck_s = now_s if has_struck else struck_s
                due_s = now_s + (self.random.expovariate(1.0 / self.every_s) if has_struck else 1.0)
            ahead = last_step(self.reference) - last_step(self.run_dir)
            if ahead > AHEAD or ahead < NEAR:
                self._pace(beside, on=ahead < NEAR)
            if now_s - self._said_s >= STEP_SAID_S:
                self.say(f"step {last_step(self.run_dir)}, the undisturbed run {last_step(self.reference)}")
            assert not asked_s or now_s - asked_s < PATIENCE_S, f"it does not end:\n{it.output[-5000:]}"
            time.sleep(0.1)
        self.say(f"harness launch ended with {it.child.returncode}")
        assert struck_s or asked_s, f"it ended with {it.child.returncode}, unasked:\n{it.output[-5000:]}"

    def _strike(self, it: Running) -> bool:
        """The next of the faults, of which each has its turn; False where it has nothing to strike at this moment."""
        if not self.bag:
            self.bag = self.random.sample(FAULTS, len(FAULTS))
        ranks, place, name = it.ranks(), self.random.randrange(2), self.bag[-1]
        has_stepped = self._has_stepped()
        if name == "ask the launcher":
            it.strike(signal.SIGTERM)
        elif name == "kill the launcher":
            it.child.kill()
        elif name == "ask by file" and has_stepped:
            (self.run_dir / "control" / "stop").touch()
        elif len(ranks) < 2 or (name == "stop a rank" and not has_stepped) or (name == "damage" and not self._damage()) or name == "ask by file":
            return False
        elif name == "kill the starter":
            ranks[0].parent().kill()
        else:
            it.strike(signal.SIGSTOP if name == "stop a rank" else signal.SIGKILL, ranks=[place])
        self.done.append(self.bag.pop())
        self.say(f"fault {len(self.done)}: {name} ({place}) {'in training' if has_stepped else 'before its first step'}, step {last_step(self.run_dir)}")
        return True

    def _has_stepped(self) -> bool:
        """Whether the attempt that runs has; a rank that stands still before that may be loading a large model."""
        known = [event for event in ledger.read(self.run_dir) if event["kind"] in ("start", "running", "relaunch", "stop")]
        return bool(known) and known[-1]["kind"] == "running" and known[-1]["time"] > self._launched

    def _damage(self) -> bool:
        """Turn over a bit in the newest checkpoint, if there are older ones that hold."""
        there = committed(self.run_dir)
        if len(there) < 3 or there[1][1] == self._damaged or there[0][1] == self._damaged:
            return False
        path = self.random.choice(sorted(there[0][1].glob("*.safetensors")) or [None])
        if path is None:
            return False
        with open(path, "r+b") as stream:
            stream.seek(self.random.randrange(path.stat().st_size))
            byte = stream.read(1)
            stream.seek(-1, os.SEEK_CUR)
            stream.write(bytes([byte[0] ^ 1 << self.random.randrange(8)]))
        self._damaged = there[0][1]
        return True

    def _wait_until_gone(self) -> None:
        """After a launcher was killed its ranks end by themselves."""
        deadline = time.monotonic() + PATIENCE_S
        while left := _processes(self.run_dir):
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.2)

    def _compare(self, steps: int) -> None:
        own, other = losses(self.run_dir), losses(self.reference)
        assert sorted(own) == list(range(1, steps + 1))
        wrong = [step for step in own if own[step] != other[step]]
        assert not wrong, f"{len(wrong)} losses differ, the first at step {wrong[0]}: {own[wrong[0]]} and {other[wrong[0]]}"
        own, other = evaluations(self.run_dir), evaluations(self.reference)
        wrong = [step for step in own if step in other and own[step] != other[step]]
        assert not wrong and len(own) >= steps // EVALUATE_EVERY, wrong
        self.say(f"all {steps} losses and {len(own)} evaluations are those of the undisturbed run, bit for bit")

    def _account(self) -> Goodput:
        found = goodput(self.run_dir)
        for name, seconds in (found.seconds | {"unaccounted": found.unaccounted_s}).items():
            print(f"  {name:30} {seconds:9.1f} s {seconds / found.wall_s:7.2%}", flush=True)
        attempts = sum(1 for one in found.starts)
        self.say(f"{len(self.done)} faults, {self.starts} launches, {attempts} attempts, goodput {found.share:.1%} of {found.wall_s:.0f} s, unaccounted {found.unaccounted_s:.1f} s")
        assert abs(found.unaccounted_s) <= SHARE * found.wall_s, found.as_json()
        return found

    def say(self, text: str) -> None:
        """A line of progress."""
        self._said_s = time.monotonic()
        seconds = int(self._said_s - self._began_s)
        print(f"[{seconds // 60:3d}:{seconds % 60:02d}] {text}", flush=True)


def _processes(run_dir: Path) -> list[int]:
    return [one.pid for one in psutil.process_iter(["cmdline"]) if f"run_dir={run_dir}" in (one.info["cmdline"] or [])]


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=60.0, help="mean seconds between faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="an empty folder that is kept; by default a temporary one")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to end"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        Soak(folder, arguments.minutes, arguments.every, arguments.seed).run()


if __name__ == "__main__":
    main()
