"""What only a GPU shows: FusedAdam, fp16 with loss scaling, bf16, and the same numbers as plain PyTorch on the same device."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from harness.testing.models import VOCABULARY, tiny_config
from harness.testing.rows import cut, random_rows
from tests.engine import work

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
STEPS = 10


@pytest.fixture(scope="module")
def device():
    from harness import distributed, world

    torch.backends.cuda.matmul.allow_tf32 = False
    yield distributed.init(world.World(), use_gpu=True, timeout_minutes=2)
    distributed.shutdown()


def trained(device: torch.device, name: str, precision: str, nvme: str) -> list[float]:
    """Losses of one rank under a shipped configuration."""
    from harness.engine.zero import ZeroEngine

    run = work.run_file(micro_batch=2, precision=precision)
    merged = work.ds_config(name, run, ranks=1, nvme=nvme)
    engine = ZeroEngine(run, tiny_config("gpt2"), copy.deepcopy(merged), device=device, weights=None)
    losses = []
    for step in range(1, STEPS + 1):
        batch = cut(random_rows(step, rows=work.ROWS, length=work.LENGTH, vocabulary=VOCABULARY), micro_batch=2, rank=0, ranks=1)
        result = engine.train_step(batch, step=step, lr=work.LR)
        losses.append(result.loss_sum.item() / batch.trained_tokens)
    engine.close()
    return losses


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero1_offload_cpu", "zero3_offload_cpu"])
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 2e-2)])
def test_losses_are_those_of_plain_pytorch(device, tmp_path, name, precision, tolerance):
    expected = work.plain("gpt2")["losses"][:STEPS]
    assert trained(device, name, precision, str(tmp_path)) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("name", ["zero1", "zero1_offload_cpu"])
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 2e-2)])
def test_a_pipeline_of_one_stage(device, name, precision, tolerance):
    """The pipeline's code path on a GPU, its clocks included; what travels between stages needs two."""
    from harness.engine.pipeline import PipelineEngine

    run = work.run_file(micro_batch=2, precision=precision)
    engine = PipelineEngine(run, tiny_config("gpt2"), work.ds_config(name, run, ranks=1, nvme=""), device=device, weights=None)
    losses = []
    for step in range(1, STEPS + 1):
        batch = cut(random_rows(step, rows=work.ROWS, length=work.LENGTH, vocabulary=VOCABULARY), micro_batch=2, rank=0, ranks=1)
        result = engine.train_step(batch, step=step, lr=work.LR)
        assert 0 < result.busy_s <= result.window_s
        losses.append(result.loss_sum.item() / batch.trained_tokens)
    engine.close()
    assert losses == pytest.approx(work.plain("gpt2")["losses"][:STEPS], rel=tolerance)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL takes one rank a GPU: two stages need two GPUs")
def test_two_stages_on_two_gpus(tmp_path):
    """Through the launcher, on its own process group."""
    import subprocess
    import sys

    program = tmp_path / "stages.py"
    program.write_text(TWO_STAGES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(word) for word in done.stdout.split("losses:")[1].split()[:STEPS]]
    assert losses == pytest.approx(work.plain("gpt2")["losses"][:STEPS], rel=1e-4)


TWO_STAGES = f"""
import torch
from harness import distributed, world
from tests.engine import work
from harness.testing.models import VOCABULARY, tiny_config
from harness.testing.rows import cut, random_rows
from harness.engine.pipeline import PipelineEngine

torch.backends.cuda.matmul.allow_tf32 = False
device = distributed.init(world.current(), use_gpu=True, timeout_minutes=2)
run = work.run_file(micro_batch=2, stages=2)
engine = PipelineEngine(run, tiny_config("gpt2"), work.ds_config("zero1", run, ranks=1, nvme=""), device=device, weights=None)
losses = []
for step in range(1, {STEPS} + 1):
    batch = cut(random_rows(step, rows=work.ROWS, length=work.LENGTH, vocabulary=VOCABULARY), micro_batch=2, rank=0, ranks=1)
    total = engine.train_step(batch, step=step, lr=work.LR).loss_sum.clone()
    distributed.all_reduce_sum(total)
    losses.append(total.item() / batch.trained_tokens)
if distributed.rank() == 0:
    print("losses:", *losses)
engine.close()
distributed.shutdown()
"""


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_fp16_with_loss_scaling_learns(device, tmp_path, name):
    losses = trained(device, name, "fp16", str(tmp_path))
    assert all(math.isfinite(loss) for loss in losses)
