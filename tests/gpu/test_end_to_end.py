"""Through the real launcher on a GPU: a run that was cut off goes on as it was, and what it exports is what it evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.formats.manifest import read_manifest
from tests.end_to_end.conftest import QUESTIONS, harness
from tests.end_to_end.faults import evaluations, interrupted, launched, losses, said, write_run
from tests.end_to_end.test_whole_chain import reference_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
STEPS, CUT = 16, 10


@pytest.mark.parametrize("name, precision", [("zero1", "fp16"), ("zero3", "bf16"), ("zero3_offload_cpu", "bf16")])
def test_cut_off_and_resumed(tmp_path: Path, name: str, precision: str):
    """Kernels that add in no fixed order may differ; that what was loaded is what was saved the run itself compares bit for bit."""
    examples = [{"question": question, "answer": answer} for question, answer in QUESTIONS]
    held = [{"question": f"{question} Really?", "answer": answer} for question, answer in QUESTIONS[:4]]
    run_file = write_run(
        tmp_path, examples, held, train={"steps": STEPS, "precision": precision, "micro_batch": 2},
        data={"packing": "best_fit", "sequence_length": 128}, engine={"deepspeed": name, "device": "auto"},
        model={"dropout": 0.0}, checkpoint={"every_steps": 4}, launch={"ranks": 1},
    )
    whole = tmp_path / "whole"
    launched(run_file, whole)
    cut = interrupted(whole, tmp_path / "cut", after=CUT, newest=8)
    launched(run_file, cut)
    assert "What was loaded is what was saved" in said(cut)
    assert losses(cut).keys() == losses(whole).keys() and losses(cut) == pytest.approx(losses(whole), rel=2e-3)
    states = [read_manifest(run_dir / "checkpoints" / f"step-{STEPS:06d}").loss_scale for run_dir in (whole, cut)]
    assert states[0] == states[1] and bool(states[0]) == (precision == "fp16")
    assert harness("export", cut, "--to", tmp_path / "folder").code == 0
    assert reference_loss(tmp_path / "folder", run_file) == pytest.approx(evaluations(cut)[STEPS], rel=2e-2)
