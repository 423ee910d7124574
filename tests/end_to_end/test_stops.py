"""A request to stop is heard within seconds wherever a run is, and what goes on afterwards is the undisturbed run."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from harness.formats.manifest import read_manifest
from tests.end_to_end.faults import Running, armed, assert_same, evaluations, events, launched, losses, running, said, write_run

WORDS = ["tone", "size", "name", "rule", "form", "pace"]
WITHIN_S = 8.0
"""From the request until all ranks have heard it, saved and written how they ended; how long interpreters take to go is another matter."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stops")


@pytest.fixture(scope="module")
def run_file(folder) -> Path:
    """An evaluation takes seconds, and so do its answers."""
    lines = [{"question": f"What is the {WORDS[n % 6]} of {n}?", "answer": f"It is {n * 7 % 23}, more or less."} for n in range(2400)]
    prompts = [line["question"] for line in lines[:16]]
    return write_run(folder, lines[:400], lines[400:], evaluation={"every_steps": 4, "prompts": prompts, "patience": 3}, checkpoint={"every_steps": None})


@pytest.fixture(scope="module")
def whole(run_file, folder) -> Path:
    launched(run_file, folder / "whole")
    return folder / "whole"


def stopped(it: Running) -> float:
    """It was asked just now and ends with code 75, all of it; gives the seconds until it had stopped, by its ledger."""
    asked = time.time()
    assert it.end() == 75 and it.outcome().state == "stopped", it.output
    assert "Traceback" not in it.output, it.output
    return events(it.run_dir, "stop")[-1]["time"] - asked


def assert_goes_on(run_file: Path, run_dir: Path, whole: Path) -> None:
    """To the same numbers, best evaluation and patience among them."""
    launched(run_file, run_dir)
    assert_same(run_dir, whole)
    state, expected = (read_manifest(place / "checkpoints" / "step-000008").state for place in (run_dir, whole))
    assert state == expected


def test_before_the_ranks_have_met(run_file, folder, tmp_path, monkeypatch):
    """Ctrl-C while rank 1 looks for rank 0, which is not there yet."""
    for name, value in armed(0, "meet", 0, tmp_path).items():
        monkeypatch.setenv(name, value)
    run_dir = folder / "unmet"
    with running(run_file, run_dir) as it:
        it.until((tmp_path / "struck").exists)
        time.sleep(3.0)  # until rank 1 has loaded its libraries and asks
        it.strike(signal.SIGINT)
        stopped(it)


@pytest.mark.slow
def test_in_the_middle_of_an_evaluation(run_file, whole, folder):
    """The step is saved without it, and the resumed run makes up for it."""
    run_dir = folder / "evaluation"
    with running(run_file, run_dir) as it:
        it.until(lambda: 4 in losses(run_dir))
        time.sleep(0.3)
        it.strike(signal.SIGTERM)
        assert stopped(it) < WITHIN_S
        assert "the evaluation is left off on request" in it.output and 4 not in evaluations(run_dir)
    assert [event["step"] for event in events(run_dir, "save")] == [4] and not read_manifest(run_dir / "checkpoints" / "step-000004").metrics
    assert_goes_on(run_file, run_dir, whole)
    assert "eval/loss" in read_manifest(run_dir / "checkpoints" / "step-000004").metrics, "saved again with what was made up for"


@pytest.mark.slow
def test_in_the_evaluation_before_the_first_step_and_on_one_rank_alone(run_file, whole, folder):
    run_dir = folder / "before"
    with running(run_file, run_dir) as it:
        it.until(lambda: "steps 0 to 8" in said(run_dir))
        time.sleep(0.5)
        it.strike(signal.SIGINT, ranks=[1])
        assert stopped(it) < WITHIN_S and "before the first step" in it.output
    assert not losses(run_dir) and not events(run_dir, "save")
    assert_goes_on(run_file, run_dir, whole)


@pytest.mark.slow
def test_between_two_answers(run_file, whole, folder):
    """By the file in the run's folder; there are few rows to evaluate, so that the answers are what it meets."""
    run_dir, few = folder / "answers", folder / "few"
    few.mkdir()
    lines = [{"question": f"What is the {WORDS[n % 6]} of {n}?", "answer": f"It is {n * 7 % 23}, more or less."} for n in range(404)]
    many = write_run(few, lines[:400], lines[400:], evaluation={"every_steps": 4, "prompts": [line["question"] for line in lines[:60]]})
    launched(many, few / "whole")
    with running(many, run_dir, "evaluation.at_start=false") as it:
        it.until(lambda: 4 in losses(run_dir))
        time.sleep(0.5)
        (run_dir / "control" / "stop").touch()
        assert stopped(it) < WITHIN_S and "the evaluation is left off on request" in it.output
    launched(many, run_dir)
    assert losses(run_dir) == losses(few / "whole")
    assert evaluations(run_dir) == {step: loss for step, loss in evaluations(few / "whole").items() if step}


@pytest.mark.slow
def test_while_the_model_is_built(run_file, whole, folder):
    """Nothing is trained, and nothing saved."""
    run_dir = folder / "built"
    with running(run_file, run_dir, "evaluation.at_start=false") as it:
        it.until(lambda: events(run_dir, "start"))
        it.strike(signal.SIGUSR1)
        assert stopped(it) < WITHIN_S + 10 and "before the first step" in it.output
    assert not losses(run_dir) and not events(run_dir, "save")
    launched(run_file, run_dir)
    assert losses(run_dir) == losses(whole)


@pytest.mark.slow
def test_a_run_that_ended_for_want_of_patience_is_over(folder, tmp_path, monkeypatch):
    """Started again it only evaluates, and hears a request meanwhile; with more patience it goes on."""
    (folder / "patience").mkdir()
    lines = [{"question": f"What is the {WORDS[n % 6]} of {n}?", "answer": f"It is {n * 7 % 23}, more or less."} for n in range(60)]
    stuck = {"optimizer": {"lr": 1e-30}, "evaluation": {"every_steps": 2, "patience": 1, "at_start": False}, "launch": {"ranks": 1}}
    run_file, run_dir = write_run(folder / "patience", lines[:50], lines[50:], **stuck), folder / "patience" / "run"
    assert "evaluation.patience" not in launched(run_file, run_dir) and list(losses(run_dir)) == [1, 2, 3, 4]
    with monkeypatch.context() as patched:
        for name, value in armed(0, "evaluate", 0, tmp_path).items():
            patched.setenv(name, value)
        with running(run_file, run_dir) as it:
            it.until((tmp_path / "struck").exists)
            it.strike(signal.SIGTERM)
            time.sleep(0.5)
            (tmp_path / "go").touch()
            stopped(it)
    assert "The run ended at step 4 by evaluation.patience: the best loss is that of step 2" in launched(run_file, run_dir)
    assert list(losses(run_dir)) == [1, 2, 3, 4] and [event["step"] for event in events(run_dir, "save")] == [2, 4]
    launched(run_file, run_dir, "evaluation.patience=2")
    assert list(losses(run_dir)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [["engine.deepspeed=zero3_offload_cpu"], ["engine.pipeline_stages=2"]])
def test_in_an_evaluation_of_other_engines(run_file, folder, engine):
    """The pipeline takes 64 micro-batches at a time, ZeRO-3 gathers in between."""
    name = engine[0][-5:]
    words = [*engine, "evaluation.prompts=[]", "evaluation.at_start=false"]
    launched(run_file, folder / f"whole-{name}", *words)
    with running(run_file, folder / name, *words) as it:
        it.until(lambda: 4 in losses(folder / name))
        time.sleep(0.5)
        it.strike(signal.SIGTERM)
        assert stopped(it) < WITHIN_S and "the evaluation is left off on request" in it.output
    launched(run_file, folder / name, *words)
    assert_same(folder / name, folder / f"whole-{name}")
