"""One undisturbed run that all cases are held against, a clock for what is measured, and a look at what a case leaves behind."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from harness.testing.models import tiny_architecture
from tests.end_to_end.faults import armed, interrupted, launched
from tests.faults import document
from tests.faults.left import Before

STEPS, CUT = 20, 12


@dataclass(frozen=True)
class Course:
    """The undisturbed run.

    Attributes:
        run_file: of every run of the matrix.
        run_dir: folder of the undisturbed one.
    """

    run_file: Path
    run_dir: Path

    def interrupted(self, run_dir: Path) -> Path:
        """The folder as it would be, had the run been lost after step 12: its newest checkpoints are those of steps 10 and 5."""
        return interrupted(self.run_dir, run_dir, after=CUT, newest=10)


@pytest.fixture(scope="session")
def course(tmp_path_factory) -> Course:
    """A tiny GPT-2 with dropout on two ranks, in fp32, with evaluations, answers and checkpoints on its way."""
    folder = tmp_path_factory.mktemp("course")
    for name, numbers in (("pairs", range(90)), ("held", range(90, 98))):
        lines = [{"question": f"What is the tone of {n}?", "answer": f"It is {n * 7 % 23}, more or less."} for n in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {
        "run_dir": str(folder / "whole"),
        "data": {
            "dir": str(folder / "data"), "train": {"path": str(folder / "pairs.jsonl")}, "validation": {"path": str(folder / "held.jsonl")},
            "shape": "prompt_completion", "columns": {"prompt": "question", "completion": "answer"}, "sequence_length": 64,
            "train_tokenizer": {"vocab_size": 320}, "packing": "none",
        },
        "model": {"architecture": tiny_architecture("gpt2", width=32, dropout=0.1)},
        "train": {"steps": STEPS, "global_batch_rows": 4, "micro_batch": 1, "precision": "fp32"},
        "optimizer": {"lr": 3e-3, "schedule": "constant"}, "engine": {"deepspeed": "zero1", "device": "cpu"},
        "evaluation": {"every_steps": 10, "at_start": False, "prompts": ["What is the tone of 1?"], "max_new_tokens": 4},
        "checkpoint": {"every_steps": 5, "keep_last": 9, "asynchronous": False}, "launch": {"ranks": 2, "restarts": 1},
    }
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(values))
    launched(run_file, folder / "whole")
    return Course(run_file, folder / "whole")


@pytest.fixture
def fault(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Arms a rank of the runs to come; gives the folder in which `struck` appears and `go` is waited for."""

    def arm(rank: int, phase: str, step: int, manner: str = "hold") -> Path:
        for name, value in armed(rank, phase, step, tmp_path, manner).items():
            monkeypatch.setenv(name, value)
        return tmp_path

    return arm


@pytest.fixture
def measured(request) -> Iterator[dict[str, float]]:
    """Seconds of this case, for the table: `noticed` and `ended` after the strike, as far as the test puts them in, and `whole`."""
    found: dict[str, float] = {}
    started = time.monotonic()
    yield found
    found["whole"] = time.monotonic() - started
    for what, seconds in found.items():
        request.node.user_properties.append((what, round(seconds, 1)))
    document.remember(request.node.callspec.params["case"].name, found)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path) -> Iterator[None]:
    """No process, zombie or orphan, and no shared memory may outlive a case."""
    before = Before.now()
    yield
    before.assert_nothing_new(tmp_path)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What a case that failed, or was left out, has measured is no measurement."""
    if not report.passed:
        document.forget(report.nodeid.rpartition("[")[2].rstrip("]"))


def pytest_sessionfinish() -> None:
    """With UPDATE_FAULTS set, put what was measured into the table."""
    if os.environ.get("UPDATE_FAULTS"):
        document.update()
