"""A run's numbers: the same in JSON Lines and in TensorBoard, and read back as they stand after resumes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time

import pytest

from harness.telemetry.read import read_metrics
from harness.telemetry.recorder import Recorder


def _board(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


def _recorder(folder, **changes):
    return Recorder(folder, **{"attempt": 1, "resumed_step": 0, "total_steps": 9} | changes)


def _step(loss: float) -> dict[str, float]:
    return {"train/loss": loss, "speed/tokens_per_second": 100.0}


def test_lines_and_tensorboard_hold_the_same_numbers(tmp_path):
    losses = {step: random.uniform(1, 9) for step in range(1, 6)}
    recorder = _recorder(tmp_path)
    recorder.hyper_parameters({"optimizer.lr": 0.125})
    for step, loss in losses.items():
        recorder.step(step, _step(loss), rows=4 * step)
    recorder.evaluation(5, {"eval/loss": 2.5}, rows=20)
    recorder.sample(5, "Why?", "Because.")
    recorder.close()
    lines = read_metrics(tmp_path)
    assert {line["step"]: line["train/loss"] for line in lines} == losses
    assert lines[-1]["eval/loss"] == 2.5 and lines[-1]["rows"] == 20 and lines[0]["memory/host_bytes"] > 1e6
    board = _board(tmp_path)
    assert {event.step: event.value for event in board.Scalars("train/loss")} == pytest.approx(losses, rel=1e-6)
    assert [event.value for event in board.Scalars("eval/loss")] == [2.5]
    (answer,) = board.Tensors("answers/Why?/text_summary")
    assert answer.tensor_proto.string_val[0] == b"Because."
    (table,) = board.Tensors("run file/text_summary")
    assert b"| optimizer.lr | 0.125 |" in table.tensor_proto.string_val[0]


def test_a_resumed_attempt_replaces_what_it_does_again(tmp_path):
    first = _recorder(tmp_path)
    for step in range(1, 7):
        first.step(step, _step(float(step)), rows=step)
    first.close()
    second = _recorder(tmp_path, attempt=2, resumed_step=4)
    second.step(5, _step(50.0), rows=5)
    second.close()
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]
    assert [(e.step, e.value) for e in _board(tmp_path).Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]


def test_an_attempt_that_begins_anew_replaces_all(tmp_path):
    first = _recorder(tmp_path)
    first.evaluation(0, {"eval/loss": 9.0}, rows=0)
    for step in range(1, 4):
        first.step(step, _step(float(step)), rows=step)
    first.close()
    second = _recorder(tmp_path, attempt=2)
    second.evaluation(0, {"eval/loss": 9.0}, rows=0)
    second.step(1, _step(1.0), rows=1)
    second.close()
    board = _board(tmp_path)
    assert [event.step for event in board.Scalars("train/loss")] == [1] and [event.step for event in board.Scalars("eval/loss")] == [0]


def test_a_step_does_not_wait_for_a_slow_disk(tmp_path, monkeypatch):
    """And its numbers are one event, for each of which TensorBoard opens the file anew."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

    recorder, append = _recorder(tmp_path), LocalFileSystem.append

    def slowly(*arguments: object) -> None:
        time.sleep(0.03)
        append(*arguments)

    monkeypatch.setattr(LocalFileSystem, "append", slowly)
    started = time.perf_counter()
    for step in range(1, 31):
        recorder.step(step, _step(float(step)), rows=step)
    assert time.perf_counter() - started < 0.5
    recorder.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    events = [event for event in LegacyEventFileLoader(str(path)).Load() if event.step]
    assert [event.step for event in events] == list(range(1, 31)) and {len(event.summary.value) for event in events} == {3}


def test_a_rollback_takes_steps_back_until_they_are_done_again(tmp_path):
    recorder = _recorder(tmp_path)
    for step in range(1, 7):
        recorder.step(step, _step(float(step)), rows=step)
    recorder.evaluation(4, {"eval/loss": 2.5}, rows=4)
    recorder.go_back(4, from_step=6, total_steps=9)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    recorder.step(5, _step(50.0), rows=6)
    recorder.close()
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == expected
    assert read_metrics(tmp_path)[3]["eval/loss"] == 2.5
    assert [(event.step, event.value) for event in _board(tmp_path).Scalars("train/loss")] == expected


def test_an_evaluation_that_is_made_up_for_joins_its_step(tmp_path):
    first = _recorder(tmp_path)
    for step in range(1, 5):
        first.step(step, _step(float(step)), rows=step)
    first.close()
    second = _recorder(tmp_path, attempt=2, resumed_step=4)
    second.evaluation(4, {"eval/loss": 2.5}, rows=4)
    second.step(5, _step(5.0), rows=5)
    second.close()
    lines = read_metrics(tmp_path)
    assert [line["train/loss"] for line in lines] == [1.0, 2.0, 3.0, 4.0, 5.0] and lines[3]["eval/loss"] == 2.5


def test_a_line_cut_short_is_left_out(tmp_path):
    lines = [json.dumps({"attempt": 1, "step": step, "train/loss": 1.0}) for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n" + lines[0][:20])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert read_metrics(tmp_path / "absent") == []


def test_a_tag_outside_the_table_is_a_fault(tmp_path):
    recorder = _recorder(tmp_path)
    with pytest.raises(KeyError, match="train/lost"):
        recorder.step(1, {"train/lost": 1.0}, rows=1)
    recorder.close()


def test_a_dead_terminal_does_not_end_training():
    code = (
        "import os, sys\nr, w = os.pipe()\nos.dup2(w, 1)\nos.close(r)\nos.close(w)\n"
        "from harness.log import say\nsay('nobody reads this')\nsay('nor this')\nprint('alive', file=sys.stderr)"
    )
    assert "alive" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr
