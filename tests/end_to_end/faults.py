"""A run that something happens to: start it, wait for a moment, strike, let it end, go on, and hold it against the undisturbed run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from harness.formats import ledger
from harness.formats.outcome import Outcome, read_outcome
from harness.telemetry.read import read_metrics
from harness.testing.models import tiny_architecture

INJECT = Path(__file__).parents[1] / "faults" / "inject"
POLL_S = 0.02
RANK = ["-m", "harness", "train"]


def armed(rank: int, phase: str, step: int, place: Path, manner: str = "hold") -> dict[str, str]:
    """Variables that arm a rank of the runs to come; in `place` the file `struck` appears and `go` is waited for (faults/inject)."""
    return {"FAULT": f"{rank}:{phase}:{step}:{manner}:{place}", "PYTHONPATH": f"{INJECT}{os.pathsep}{os.environ['PYTHONPATH']}"}


def write_run(folder: Path, train: list[dict], held: list[dict], /, **sections: dict) -> Path:
    """A run file in `folder` for a tiny GPT-2 on two ranks, on examples with `question` and `answer`; `sections` add to its own or replace."""
    for name, lines in (("pairs", train), ("held", held)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values: dict = {
        "run_dir": str(folder / "run"),
        "data": {
            "dir": str(folder / "data"), "train": {"path": str(folder / "pairs.jsonl")}, "validation": {"path": str(folder / "held.jsonl")},
            "shape": "prompt_completion", "columns": {"prompt": "question", "completion": "answer"}, "sequence_length": 64,
            "train_tokenizer": {"vocab_size": 320}, "packing": "none",
        },
        "model": {"architecture": tiny_architecture("gpt2", width=64, dropout=0.1)},
        "train": {"steps": 8, "global_batch_rows": 4, "micro_batch": 1, "precision": "fp32"},
        "optimizer": {"lr": 3e-3, "schedule": "constant"}, "engine": {"deepspeed": "zero1", "device": "cpu"},
        "evaluation": {"every_steps": 4}, "checkpoint": {"every_steps": 4, "keep_last": 9}, "launch": {"ranks": 2, "restarts": 0},
    }
    for name, section in sections.items():
        values[name] = values[name] | section
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step, as it stands after resumes."""
    return {line["step"]: line["train/loss"] for line in read_metrics(run_dir) if "train/loss" in line}


def evaluations(run_dir: Path) -> dict[int, float]:
    """Evaluation loss by step."""
    return {line["step"]: line["eval/loss"] for line in read_metrics(run_dir) if "eval/loss" in line}


def events(run_dir: Path, kind: str) -> list[dict]:
    """Events of one kind in the run's ledger."""
    return [event for event in ledger.read(run_dir) if event["kind"] == kind]


def said(run_dir: Path) -> str:
    """What all ranks of all attempts have logged."""
    return "".join(path.read_text(errors="replace") for path in sorted(run_dir.glob("attempts/*/logs/*")) if path.is_file())


@dataclass
class Running:
    """A `harness launch` under way.

    Attributes:
        child: the launcher.
        run_dir: of the run.
        told: file of what it prints.
    """

    child: subprocess.Popen[bytes]
    run_dir: Path
    told: Path

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.told.read_text(errors="replace")

    def until(self, there: Callable[[], object], *, timeout_s: float = 120.0) -> None:
        """Wait for a moment; a run that ends before it comes fails the test."""
        deadline = time.monotonic() + timeout_s
        while not there():
            assert self.child.poll() is None, f"it ended with {self.child.returncode} before the moment came:\n{self.output}"
            assert time.monotonic() < deadline, f"the moment did not come in {timeout_s:g} s:\n{self.output}"
            time.sleep(POLL_S)

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, by rank; not DeepSpeed's launchers, nor a rank's own children."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.child.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    words = process.cmdline()
                    if any(words[place : place + 3] == RANK for place in range(len(words))):
                        found[process.pid] = process
        return [process for process in found.values() if process.ppid() not in found]

    def strike(self, number: int, *, ranks: list[int] | None = None) -> None:
        """A signal to ranks, by their place; to the launcher, which passes requests on, when none are named."""
        if ranks is None:
            self.child.send_signal(number)
            return
        there = self.ranks()
        for place in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                there[place].send_signal(number)

    def kill(self) -> None:
        """kill -9 of every rank."""
        self.strike(signal.SIGKILL, ranks=list(range(len(self.ranks()))))

    def end(self, *, timeout_s: float = 120.0) -> int:
        """Wait for the launcher and give its code; no process of the run may be left, but for the moment in which the last one goes."""
        code = self.child.wait(timeout=timeout_s)
        deadline = time.monotonic() + 3.0
        while left := self._left():
            assert time.monotonic() < deadline, left
            time.sleep(POLL_S)
        return code

    def _left(self) -> list[list[str]]:
        """Command lines that name the run's folder."""
        lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        return [line for line in lines if f"run_dir={self.run_dir}" in line]

    def outcome(self) -> Outcome:
        """What it left behind."""
        found = read_outcome(self.run_dir)
        assert found is not None, self.output
        return found


@contextmanager
def running(run_file: Path, run_dir: Path, *words: object) -> Iterator[Running]:
    """`harness launch RUN_FILE WORDS run_dir=RUN_DIR`, ended by force if the test does not end it."""
    told = run_dir.with_name(f"{run_dir.name}.told")
    with open(told, "ab") as stream:
        command = [sys.executable, "-m", "harness", "launch", str(run_file), *map(str, words), f"run_dir={run_dir}"]
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    started = Running(child, run_dir, told)
    try:
        yield started
    finally:
        if child.poll() is None:
            started.kill()
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=60)


def launched(run_file: Path, run_dir: Path, *words: object, code: int = 0, timeout_s: float = 400.0) -> str:
    """A launch from start to end, which must answer with `code`; gives what it printed."""
    with running(run_file, run_dir, *words) as it:
        before = len(it.output) if it.told.exists() else 0
        found = it.child.wait(timeout=timeout_s)
        assert found == code, it.output[before:]
    return it.output


def interrupted(whole: Path, run_dir: Path, *, after: int, newest: int) -> Path:
    """A copy of a finished run's folder as it would be, had the run been lost after a step, with the checkpoints that stood by then."""
    shutil.copytree(whole, run_dir)
    for folder in (run_dir / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > after:
            shutil.rmtree(folder)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= after))
    (run_dir / "checkpoints" / "latest").write_text(f"step-{newest:06d}\n")
    (run_dir / "outcome.json").unlink()
    return run_dir


def assert_same(run_dir: Path, reference: Path) -> None:
    """The same losses and the same evaluations, bit for bit, at the same steps."""
    assert losses(run_dir) == losses(reference)
    assert evaluations(run_dir) == evaluations(reference)
