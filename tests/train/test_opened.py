"""What is told of a step, also where the cost of a token is not known."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from harness.engine.steps import StepResult
from harness.train.compose import _work
from harness.train.opened import OpenStep


def test_what_cannot_be_counted_stops_no_run():
    """A model whose configuration has other words than transformers' trains without FLOP/s."""
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=object), get_input_embeddings=object)
    run = SimpleNamespace(data=SimpleNamespace(sequence_length=64), train=SimpleNamespace(precision="fp32"))
    work = _work(run, SimpleNamespace(whole_model=lambda: model, device=torch.device("cpu")))
    assert work.flops_per_token is None
    step = OpenStep(step=1, rows=1, result=StepResult(torch.zeros(()), torch.zeros(()), 1, 1.0, True), lr=1.0, seconds=1.0, data_wait_seconds=0.0,
                    positions=1, first_row=0, is_full=True)
    metrics = step.metrics(SimpleNamespace(loss_sum=1.0, aux_loss=0.0, idle_share=None), None, work)
    assert metrics["train/loss"] == 1.0 and "speed/flops_per_rank" not in metrics and "speed/mfu" not in metrics
