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


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_fp16_with_loss_scaling_learns(device, tmp_path, name):
    losses = trained(device, name, "fp16", str(tmp_path))
    assert all(math.isfinite(loss) for loss in losses)
