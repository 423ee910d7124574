"""A spike takes a run back to its last checkpoint in the same process: the rows are passed over, and all else is as if they had not been there."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
from pathlib import Path

import pytest

from harness.config.load import load
from harness.data.provenance import origins
from harness.data.sets import open_data
from harness.formats.manifest import read_manifest, write_manifest
from harness.telemetry.read import read_metrics
from tests.end_to_end.conftest import harness
from tests.end_to_end.faults import assert_same, evaluations, events, launched, losses, running, write_run

BAD = 77
WORDS = ["train.spikes=rollback", "train.spike_zscore=6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("planted")


@pytest.fixture(scope="module")
def planted(folder) -> Path:
    """The run file of a tiny run whose data hold one document of noise, which the order of training brings between steps 62 and 69."""
    draw = random.Random(0)
    lines = [{"question": f"What is the size of {n}?", "answer": f"It is {n * 7 % 23} sizes, more or less."} for n in range(400)]
    lines[BAD - 1] = {"question": "What?", "answer": "".join(draw.choices("zqxjkvbw%&@#", k=45))}
    held = [line | {"question": f"{line['question']} Really?"} for line in lines[:5]]
    sections = {"train": {"steps": 80}, "evaluation": {"every_steps": 12}, "checkpoint": {"every_steps": 12, "keep_last": 9}}
    path = write_run(folder, lines, held, **sections)
    assert harness("prepare", path).code == 0
    sections["train"]["seed"] = next(seed for seed in range(1000) if 62 <= _position(path, seed) // 4 + 1 <= 69)
    return write_run(folder, lines, held, **sections)


def _position(path: Path, seed: int) -> int:
    """Where the order of a seed has the planted document."""
    run = load(path).run
    table = open_data(run).train
    rows = table.order(seed=seed, window_shards=run.data.window_shards).rows(0, table.num_rows).tolist()
    return next(place for place, row in enumerate(rows) if any(number == BAD for _, number in origins(table, row)))


@pytest.fixture(scope="module")
def rolled_back(planted, folder) -> Path:
    """The run folder of the undisturbed run that rolled back."""
    told = launched(planted, folder / "whole", *WORDS)
    assert "Rolled back to step-000060" in told, told
    return folder / "whole"


def passed(run_dir: Path) -> list[list[int]]:
    return read_manifest(run_dir / "checkpoints" / "step-000072").state["passed"]


def test_a_spike_takes_the_run_back_and_its_rows_are_passed_over(planted, rolled_back):
    """Code 0, the steps done again, and all records agree about what was left out."""
    step = _position(planted, load(planted).run.train.seed) // 4 + 1
    rows = [4 * (step - 1), 4 * step]
    (event,) = events(rolled_back, "rollback")
    assert (event["step"], event["to"], event["rows"]) == (step, 60, rows) and event["seconds"] > 0
    assert [one["step"] for one in events(rolled_back, "anomaly")] == [step] and passed(rolled_back) == [rows]
    kept = [json.loads(line) for line in (rolled_back / "quarantine.jsonl").read_text().splitlines()]
    assert BAD in {document["row"] for line in kept for document in line["documents"]} and len(kept) == 4
    lines = read_metrics(rolled_back)
    assert [line["step"] for line in lines] == list(range(81)) and {line["attempt"] for line in lines} == {1}
    assert lines[-1]["rows"] == 4 * 81, "the cursor counts the rows that were passed over"
    assert max(losses(rolled_back)[number] for number in range(61, 81)) < 2 * losses(rolled_back)[60], "no spike is left"
    where = harness("data", "where", planted.parent / "data" / "train", BAD - 1, "--run", rolled_back)
    assert where.code == 0 and "passed over: its step was a spike" in where.output, where.output
    shown = harness("data", "show", planted.parent / "data" / "train", "--step", step, "--run", rolled_back)
    assert shown.code == 0 and not any(f"pairs.jsonl:{document['row']} " in shown.output for line in kept for document in line["documents"])
    assert harness("verify", rolled_back).code == 0


@pytest.mark.slow
def test_from_the_checkpoint_on_it_is_the_run_that_never_saw_those_rows(planted, rolled_back, folder):
    """The same checkpoint with the rows passed over from the start, in a run that judges nothing."""
    clean = folder / "clean"
    shutil.copytree(rolled_back / "checkpoints" / "step-000060", clean / "checkpoints" / "step-000060")
    shutil.copytree(rolled_back / "attempts", clean / "attempts")
    place = clean / "checkpoints" / "step-000060"
    manifest = read_manifest(place)
    write_manifest(place, manifest.model_copy(update={"state": manifest.state | {"passed": passed(rolled_back)}, "certificate": None}))
    launched(planted, clean, "train.spikes=ignore")
    expected = {step: loss for step, loss in losses(rolled_back).items() if step > 60}
    assert losses(clean) == expected and len(expected) == 20
    assert evaluations(clean) == {step: loss for step, loss in evaluations(rolled_back).items() if step > 60}


@pytest.mark.slow
@pytest.mark.parametrize("step", [62, 75])
def test_killed_after_the_rollback_and_resumed_is_the_undisturbed_run(planted, rolled_back, folder, step):
    """Before the next checkpoint, so that the spike is met again, and after it."""
    run_dir = folder / f"killed-{step}"
    with running(planted, run_dir, *WORDS) as it:
        it.until(lambda: events(run_dir, "rollback") and step in losses(run_dir))
        it.kill()
        assert it.end() not in (0, 2)
    assert "Resuming from step-0000" in launched(planted, run_dir, *WORDS)
    assert_same(run_dir, rolled_back)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [
    ["engine.deepspeed=zero3_offload_cpu"], ["engine.deepspeed=zero2"], ["engine.deepspeed=zero3"], ["engine.pipeline_stages=2"],
    ["engine.deepspeed=zero1_offload_cpu", "engine.pipeline_stages=2"],
])
def test_under_every_engine_in_epochs_with_a_stop_in_between(planted, folder, engine):
    """Counted in epochs the run has a step less; asked to stop after the rollback, it goes on to the same losses."""
    name = "-".join(re.findall(r"\w+$", engine[0]) + [str(len(engine))])
    words = [*WORDS, *engine, "train.steps=null", "train.epochs=0.8"]
    whole, run_dir = folder / f"whole-{name}", folder / f"stopped-{name}"
    launched(planted, whole, *words)
    assert len(events(whole, "rollback")) == 1 and max(losses(whole)) == 79
    with running(planted, run_dir, *words) as it:
        it.until(lambda: events(run_dir, "rollback"))
        it.strike(signal.SIGTERM)
        assert it.end() == 75
    launched(planted, run_dir, *words)
    assert_same(run_dir, whole)


@pytest.mark.slow
def test_without_a_checkpoint_or_too_often_it_stops(planted, folder):
    """Code 3, with the reason."""
    ended = launched(planted, folder / "none", *WORDS, "checkpoint.every_steps=null", "checkpoint.keep_best=false", code=3)
    assert "no checkpoint before it to roll back to" in ended and "Traceback" not in ended, ended
    ended = launched(planted, folder / "often", *WORDS, "train.max_rollbacks=0", code=3)
    assert "rolled back 0 times (train.max_rollbacks)" in ended and "Traceback" not in ended, ended
