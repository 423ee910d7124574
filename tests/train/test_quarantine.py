"""The documents of a step that stood out: written, or said to be lacking, while training goes on."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from harness.config.schema import RunFile
from harness.data.prepare import prepare
from harness.train import quarantine
from harness.train.progress import Progress
from harness.train.quarantine import Quarantine
from tests.data.conftest import make_run, write_pairs


@pytest.fixture
def run(tmp_path) -> RunFile:
    """Of prepared data, a pair a row."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 40)
    made = make_run(tmp_path, train={"path": str(pairs)}, shape="prompt_completion", packing="none", num_processes=1)
    prepare(made, progress=False)
    made.run_path.mkdir(exist_ok=True)
    return made


@pytest.fixture
def words(monkeypatch) -> list[str]:
    """What it says."""
    found: list[str] = []
    monkeypatch.setattr(quarantine, "say", found.append)
    return found


def written(run: RunFile) -> list[dict]:
    return [json.loads(line) for line in (run.run_path / "quarantine.jsonl").read_text().splitlines()]


def test_rows_that_were_passed_over_are_none_of_the_step(run, words):
    it = Quarantine(run)
    assert it(Progress(passed=[[6, 8]]), 2, 4, 10) == str(run.run_path / "quarantine.jsonl")
    it.close()
    assert [(line["step"], line["position"], len(line["documents"])) for line in written(run)] == [(2, place, 1) for place in (4, 5, 8, 9)]
    assert all(line["documents"][0]["file"].endswith("pairs.jsonl") for line in written(run)) and not words


def test_sets_that_are_gone_end_nothing(run, words):
    shutil.rmtree(Path(run.data.dir) / "train")
    it = Quarantine(run)
    it(Progress(), 2, 4, 8)
    it.close()
    assert len(words) == 1 and words[0].startswith("The documents of step 2 are not in ")


def test_training_does_not_wait_for_sets_that_are_not_there_yet(run, words, monkeypatch):
    index = Path(run.data.dir) / "train" / "index.json"
    aside = index.rename(index.with_suffix(".aside"))
    it, started = Quarantine(run), time.monotonic()
    monkeypatch.setattr(quarantine, "PATIENCE_S", 0.3)
    it(Progress(), 2, 4, 8)
    assert time.monotonic() - started < 1.0
    it.close()
    assert time.monotonic() - started < 10.0 and "is not complete" in words[-1]
    aside.rename(index)
    monkeypatch.setattr(quarantine, "PATIENCE_S", 30.0)
    it.close()
    assert [line["position"] for line in written(run)] == [4, 5, 6, 7]
