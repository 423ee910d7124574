"""The whole chain through the real launcher: train, kill, resume, export, answer."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from harness.formats import ledger
from harness.formats.outcome import read_outcome
from harness.telemetry.read import read_metrics
from tests.end_to_end.conftest import QUESTIONS, harness
from tests.end_to_end.faults import evaluations, losses, running


def reference_loss(folder: Path, run_file: Path) -> float:
    """The evaluation loss of an export in plain transformers, document by document."""
    import datasets
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    for document in datasets.load_from_disk(str(run_file.parent / "data" / "validation")):
        ids = torch.tensor([document["input_ids"]])
        labels = torch.full_like(ids, -100)
        for start, stop in zip(document["trained_starts"], document["trained_stops"], strict=True):
            labels[0, max(start, 1) : stop] = ids[0, max(start, 1) : stop]
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        total += torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum").item()
        tokens += int((labels[0, 1:] != -100).sum())
    return total / tokens


def test_learned_by_heart(run_file, tmp_path):
    """Sixteen pairs, trained to a loss near zero, come back word for word and stop by themselves."""
    done = harness("launch", run_file, "train.steps=160", "evaluation.every_steps=80", "model.dropout=0", "checkpoint.every_steps=null",
                   "train.activation_checkpointing=0", "engine.deepspeed=zero1", timeout=400)
    assert done.code == 0, done.output
    run_dir = tmp_path / "run"
    assert losses(run_dir)[160] < 0.05
    assert harness("export", run_dir, "--to", tmp_path / "folder").code == 0
    prompts = [word for question, _ in QUESTIONS for word in ("--prompt", question)]
    answers = harness("generate", tmp_path / "folder", *prompts, "--max-new-tokens", 60)
    assert answers.code == 0, answers.output
    for question, answer in QUESTIONS:
        assert f"> {question}\n{answer}\n" in answers.output
    assert reference_loss(tmp_path / "folder", run_file) == pytest.approx(evaluations(run_dir)[160], rel=1e-5)


def _kill_after(run_file: Path, run_dir: Path, step: int, number: int, *overrides: str) -> int:
    """Start a run and send every rank a signal once `step` has been recorded; returns the launcher's code."""
    with running(run_file, run_dir, *overrides) as it:
        it.until(lambda: step in losses(run_dir), timeout_s=200)
        it.kill() if number == signal.SIGKILL else it.strike(number)
        return it.end()


RESUMES = [
    ("zero3_offload_cpu", 1),
    *(pytest.param(name, stages, marks=pytest.mark.slow) for name, stages in (("zero1", 2), ("zero2", 1), ("zero3", 1), ("zero3_offload_nvme", 1), ("zero1_offload_cpu", 2))),
]


@pytest.mark.parametrize("name, stages", RESUMES)
def test_killed_and_resumed_is_the_undisturbed_run(run_file, tmp_path, name, stages):
    """kill -9 after an evaluation, resumed across the end of an epoch, with dropout on: the same losses bit for bit."""
    words = [f"engine.deepspeed={name}", f"engine.pipeline_stages={stages}", f"engine.nvme_dir={tmp_path / 'nvme'}", "train.steps=40",
             "evaluation.every_steps=15", "checkpoint.every_steps=5", "checkpoint.keep_last=9", "checkpoint.keep_best=false"]
    whole = harness("launch", run_file, *words, f"run_dir={tmp_path / 'whole'}")
    assert whole.code == 0, whole.output
    code = _kill_after(run_file, tmp_path / "run", 21, signal.SIGKILL, *words)
    assert code not in (0, 2), "a killed rank is a failure"
    again = harness("launch", run_file, *words)
    assert again.code == 0, again.output
    resumed = re.search(r"Resuming from step-0000(\d+)", again.output)
    assert resumed and 15 <= int(resumed[1]) < 40, again.output  # that of step 20, unless it was still being written
    expected = losses(tmp_path / "whole")
    assert losses(tmp_path / "run") == expected and len(expected) == 40
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written_behind_it(run_file, tmp_path):
    """kill -9 when the files of the second checkpoint have begun and training goes on: the first one stands, and the losses are the undisturbed ones."""
    run_dir, words = tmp_path / "run", ["model.architecture.n_embd=384", "train.steps=9", "checkpoint.every_steps=3", "checkpoint.keep_best=false", "evaluation.every_steps=null"]
    assert harness("launch", run_file, *words, f"run_dir={tmp_path / 'whole'}").code == 0
    with running(run_file, run_dir, *words) as it:
        it.until(lambda: list(run_dir.glob("checkpoints/step-000006.tmp-1/*")), timeout_s=200)
        it.kill()
        it.end()
    assert [event["step"] for event in ledger.read(run_dir) if event["kind"] == "save"] == [3]
    again = harness("launch", run_file, *words)
    assert again.code == 0 and "step-000006.tmp-1 was not finished" in again.output and "Resuming from step-000003" in again.output, again.output
    assert losses(run_dir) == losses(tmp_path / "whole") and len(losses(run_dir)) == 9


@pytest.mark.slow
def test_stop_request_saves_and_says_resume_me(run_file, tmp_path):
    run_dir = tmp_path / "run"
    code = _kill_after(run_file, run_dir, 2, signal.SIGTERM, "train.steps=400", "checkpoint.every_steps=null", "evaluation.every_steps=null")
    outcome = read_outcome(run_dir)
    assert (code, outcome.code, outcome.state) == (75, 75, "stopped"), outcome
    saved = [event["step"] for event in ledger.read(run_dir) if event["kind"] == "save"]
    assert saved and saved[-1] >= 2
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(run_file) in (p.info["cmdline"] or [])], "no rank is left"
    done = harness("launch", run_file, f"train.steps={saved[-1] + 2}", "evaluation.every_steps=null")
    assert done.code == 0 and f"Resuming from step-{saved[-1]:06d}" in done.output, done.output


def test_a_touched_file_asks_for_a_checkpoint_and_for_a_stop(run_file, tmp_path):
    run_dir = tmp_path / "run"
    words = [sys.executable, "-m", "harness", "launch", str(run_file), "train.steps=4000", "checkpoint.every_steps=null", "evaluation.every_steps=null"]
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def until(there) -> None:
        deadline = time.monotonic() + 120
        while not there():
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)

    def saves() -> list[int]:
        return [event["step"] for event in ledger.read(run_dir) if event["kind"] == "save"]

    until(lambda: 2 in losses(run_dir))
    (run_dir / "control" / "save").touch()
    until(saves)
    seen = len(losses(run_dir))
    until(lambda: len(losses(run_dir)) > seen + 1)
    assert not list((run_dir / "control").iterdir()), "the request was taken"
    (run_dir / "control" / "stop").touch()
    assert child.wait(timeout=60) == 75 and read_outcome(run_dir).state == "stopped"
    assert len(saves()) == 2


@pytest.mark.slow
def test_a_spike_stops_the_run_and_leaves_its_documents(run_file, tmp_path):
    """At a threshold that the noise of batches passes: all ranks end with code 3, and what the step trained on is kept."""
    ended = harness("launch", run_file, "train.steps=200", "optimizer.lr=1e-6", "train.spikes=stop", "train.spike_zscore=0.6", "evaluation.every_steps=null",
                    "checkpoint.every_steps=10", "engine.deepspeed=zero1")
    outcome, run_dir = read_outcome(tmp_path / "run"), tmp_path / "run"
    assert ended.code == 3 and outcome.state == "anomaly" and "Traceback" not in ended.output, ended.output
    step = max(losses(run_dir))
    assert f"Step {step}: the loss" in ended.output and step > 20
    kept = [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [step] * 4 and [line["position"] for line in kept] == list(range(4 * (step - 1), 4 * step))
    shown = harness("data", "show", tmp_path / "data" / "train", "--step", step, "--run", run_dir)
    rows = {document["row"] for line in kept for document in line["documents"]}
    assert shown.code == 0 and all(f"pairs.jsonl:{row} " in shown.output for row in rows), shown.output
    saved = [event["step"] for event in ledger.read(run_dir) if event["kind"] == "save"]
    assert saved[-1] == step // 10 * 10 if step % 10 else saved[-1] < step, "nothing of the step was saved"


@pytest.mark.slow
def test_exports_from_two_and_from_four_stages_agree(run_file, tmp_path):
    """After equal steps from equal weights, and each gives in plain transformers the loss that its run reported."""
    found = []
    for stages in (2, 4):
        words = [f"run_dir={tmp_path / str(stages)}", "model.architecture.n_layer=4", "model.dropout=0", "engine.deepspeed=zero1",
                 f"engine.pipeline_stages={stages}", f"launch.ranks={stages}", "evaluation.prompts=['What is the tone of 0?']"]
        done = harness("launch", run_file, *words)
        assert done.code == 0, done.output
        assert harness("export", tmp_path / str(stages), "--to", tmp_path / f"folder-{stages}").code == 0
        found.append(reference_loss(tmp_path / f"folder-{stages}", run_file))
        assert found[-1] == pytest.approx(evaluations(tmp_path / str(stages))[8], rel=1e-5)
        shares = [line["speed/pipeline_idle_share"] for line in read_metrics(tmp_path / str(stages)) if "speed/pipeline_idle_share" in line]
        assert len(shares) == 8 and all(0 < share < 1 for share in shares)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


CHANGES = [("zero3", 2, "zero1", 1), ("zero3_offload_nvme", 2, "zero3", 2), ("zero2", 2, "zero3_offload_nvme", 2), ("zero1_offload_cpu", 1, "zero3", 4)]


@pytest.mark.slow
@pytest.mark.parametrize("before, ranks_before, after, ranks_after", CHANGES)
def test_another_topology_goes_on(run_file, tmp_path, before, ranks_before, after, ranks_after):
    common = [f"engine.nvme_dir={tmp_path / 'nvme'}", "model.dropout=0", "train.steps=8", "data.packing=none"]
    whole = harness("launch", run_file, *common, f"engine.deepspeed={before}", f"launch.ranks={ranks_before}", f"run_dir={tmp_path / 'whole'}")
    assert whole.code == 0, whole.output
    first = harness("launch", run_file, *common, "train.steps=4", f"engine.deepspeed={before}", f"launch.ranks={ranks_before}")
    assert first.code == 0, first.output
    second = harness("launch", run_file, *common, f"engine.deepspeed={after}", f"launch.ranks={ranks_after}")
    assert second.code == 0 and "Resuming from step-000004" in second.output, second.output
    expected, got = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero1_offload_cpu", "zero3_offload_cpu", "zero3_offload_nvme"])
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 1e-3)])
def test_every_export_gives_the_reported_loss(run_file, tmp_path, name, precision, tolerance):
    done = harness("launch", run_file, f"engine.deepspeed={name}", f"train.precision={precision}", f"engine.nvme_dir={tmp_path / 'nvme'}")
    assert done.code == 0, done.output
    exported = harness("export", tmp_path / "run", "--to", tmp_path / "folder")
    assert exported.code == 0, exported.output
    loss = reference_loss(tmp_path / "folder", run_file)
    assert loss == pytest.approx(evaluations(tmp_path / "run")[8], rel=tolerance)


