"""What a real run leaves for its review: the parts of a step under both engines, a trace on request, TensorBoard's charts, and the page."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from harness.telemetry.read import read_metrics
from tests.end_to_end.faults import events, running, write_run

PARTS = ("forward", "backward", "update")


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"deepspeed": "zero3_offload_cpu"}, {"deepspeed": "zero1", "pipeline_stages": 2}], ids=["zero", "pipeline"])
def test_a_run_is_reviewed(engine, tmp_path):
    pairs = [{"question": f"what is {number}?", "answer": f"{number * 7}"} for number in range(40)]
    run_file, run_dir = write_run(tmp_path, pairs[:32], pairs[32:], engine=engine, train={"steps": 100_000}), tmp_path / "run"
    with running(run_file, run_dir) as it:
        it.until((run_dir / "metrics.jsonl").exists)
        (run_dir / "control" / "trace").touch()
        it.until(lambda: len(events(run_dir, "trace")) == 1)
        until = events(run_dir, "trace")[0]["last"] + 5
        it.until(lambda: (lines := read_metrics(run_dir)) and lines[-1]["step"] >= until)
        (run_dir / "control" / "stop").touch()
        assert it.end() == 75, it.output
    (told,) = events(run_dir, "trace")
    traces = sorted(path.name for path in (run_dir / "attempts" / "0001" / "traces").glob("*.gz"))
    traced = [0, 1] if "pipeline_stages" in engine else [0]
    assert traces == [f"step-{told['first']:06d}-rank-{rank:05d}.pt.trace.json.gz" for rank in traced], "one rank of each stage"
    assert (run_dir / told["path"]).is_file()

    lines = [line for line in read_metrics(run_dir) if "train/loss" in line]
    for line in lines:
        spent = sum(line[f"speed/{part}_seconds"] for part in PARTS)
        assert 0 < spent <= line["speed/step_seconds"] and line["speed/flops_per_rank"] > 0 and "speed/mfu" not in line, line

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert {f"speed/{part}_seconds" for part in PARTS} <= set(board.Tags()["scalars"])
    assert "custom_scalars__config__" in board.Tags()["tensors"]

    page = tmp_path / "page.html"
    done = subprocess.run([sys.executable, "-m", "harness", "review", str(run_dir), "--html", str(page), "--json", "--fail-if", "goodput > 2"],
                          capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["summary"]["steps"] == lines[-1]["step"] and found["summary"]["ranks"] == 2 and "What a step goes to" in page.read_text()
    assert abs(found["unaccounted_s"]) < 1.0
