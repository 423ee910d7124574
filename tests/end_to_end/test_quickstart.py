"""The quickstart, whole; then its fine-tuning again from random weights."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from harness.cli.quickstart import RUNS
from harness.telemetry.read import read_metrics
from tests.end_to_end.conftest import harness

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def _evaluations(run_dir) -> list[float]:
    return [line["eval/loss"] for line in read_metrics(run_dir) if "eval/loss" in line]


def test_fine_tuning_beats_the_same_recipe_from_random_weights(tmp_path):
    folder = tmp_path / "quickstart"
    done = subprocess.run([sys.executable, "-m", "harness.cli.quickstart", "--dir", str(folder)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    for told in ("What was learned", "Time by phase", "tensorboard --logdir", "What does `"):
        assert told in done.stdout
    assert (folder / "finetuned" / "model.safetensors").is_file()
    assert list((folder / "finetune" / "tensorboard").glob("events.out.tfevents.*"))
    again = subprocess.run([sys.executable, "-m", "harness.cli.quickstart", "--dir", str(folder)], capture_output=True, text=True, timeout=200)
    assert again.returncode == 0 and again.stdout.count("already done") == 2, again.stdout + again.stderr
    piped = subprocess.run(
        [sys.executable, "-m", "harness.cli.quickstart", "--dir", str(folder), "--engine", "pipeline"], capture_output=True, text=True, timeout=600
    )
    assert piped.returncode == 0 and "2 pipeline stages" in piped.stdout and "What was learned" in piped.stdout, piped.stdout + piped.stderr
    assert (folder / "finetuned-pipeline" / "model.safetensors").is_file()
    through_stages = _evaluations(folder / "finetune-pipeline")
    assert through_stages[0] == pytest.approx(_evaluations(folder / "finetune")[0], rel=1e-5), "the same weights and rows to begin with"
    assert all(after < before for before, after in zip(through_stages, through_stages[1:], strict=False)), through_stages
    architecture = yaml.safe_load((RUNS / "quickstart_pretrain.yaml").read_text())["model"]["architecture"]
    random = harness(
        "launch", RUNS / "quickstart_finetune.yaml", f"run_dir={tmp_path / 'random'}", f"data.dir={folder / 'data' / 'questions'}",
        f"data.tokenizer={folder / 'pretrained'}", "model.path=null", f"model.architecture={yaml.safe_dump(architecture, default_flow_style=True).strip()}",
        "evaluation.prompts=[]", timeout=600,
    )
    assert random.code == 0, random.output
    tuned, scratch = _evaluations(folder / "finetune"), _evaluations(tmp_path / "random")
    assert len(tuned) == len(scratch)
    assert tuned[0] < scratch[0] and tuned[-1] < scratch[-1], (tuned, scratch)
    assert all(after < before for before, after in zip(tuned, tuned[1:], strict=False)), tuned
