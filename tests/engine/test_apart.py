"""An engine tries its model on a packed row: one whose documents meet is refused by every rank, and the trial leaves no trace in training."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from harness.testing.models import VOCABULARY, tiny_config
from harness.testing.rows import cut, random_rows
from tests.engine import work

CONFIGURATIONS = ["zero1", "zero3"]


def opened(name: str, config: Any, *, packing: str, precision: str = "fp32") -> Any:
    from harness import distributed
    from harness.engine.zero import ZeroEngine

    run = work.run_file(micro_batch=2, precision=precision)
    run = run.model_copy(update={"data": run.data.model_copy(update={"packing": packing})})
    merged = work.ds_config(name, run, ranks=distributed.size(), nvme="")
    return ZeroEngine(run, config, copy.deepcopy(merged), device=torch.device("cpu"), weights=None)


def opt() -> Any:
    from transformers import OPTConfig

    return OPTConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32,
                     max_position_embeddings=256, dropout=0.0, pad_token_id=0, bos_token_id=0, eos_token_id=0)


def steps(engine: Any, number: int) -> list[float]:
    from harness import distributed

    losses = []
    for step in range(1, number + 1):
        rows = random_rows(step, rows=work.ROWS, length=work.LENGTH, vocabulary=VOCABULARY)
        batch = cut(rows, micro_batch=2, rank=distributed.rank(), ranks=distributed.size())
        total = engine.train_step(batch, step=step, lr=work.LR).loss_sum.clone()
        distributed.all_reduce_sum(total)
        losses.append(total.item())
    return losses


def refusal(name: str, precision: str) -> str:
    from harness.errors import Refused

    try:
        opened(name, opt(), packing="best_fit", precision=precision)
    except Refused as refused:
        return str(refused)
    return "accepted"


def unpacked(name: str) -> list[float]:
    engine = opened(name, opt(), packing="none")
    losses = steps(engine, 2)
    engine.close()
    return losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_all_ranks_refuse_a_model_whose_documents_meet(ranks2, name, precision):
    one, other = ranks2.run(refusal, name, precision, timeout=90.0)
    assert one == other
    assert "'opt' (sdpa) crosses the borders of packed documents" in one and "data.packing=none" in one


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_with_one_document_a_row_documents_cannot_meet(ranks2, name):
    assert all(np.isfinite(losses).all() for losses in ranks2.run(unpacked, name))


def trained(name: str, dropout: float, tried: bool) -> dict[str, Any]:
    """Everything that a trial could have moved, and when ZeRO-3 had its trace of the modules."""
    from harness.engine.zero import ZeroEngine

    torch.manual_seed(7)
    trial, ZeroEngine.try_model = ZeroEngine.try_model, ZeroEngine.try_model if tried else lambda engine: None
    try:
        engine = opened(name, tiny_config("gpt2", dropout=dropout), packing="best_fit")
    finally:
        ZeroEngine.try_model = trial
    drawn = torch.rand(3).tolist()
    deepspeed = engine.deepspeed
    counters = [deepspeed.micro_steps, deepspeed.global_steps, deepspeed.skipped_steps, deepspeed.training, engine.loss_scale()]
    coordinator = deepspeed.optimizer.parameter_offload.get_param_coordinator() if engine.stage == 3 else None
    losses, traced = [], []
    forward = engine._forward

    def watched(micro: Any, *, tokens: int) -> Any:
        output = forward(micro, tokens=tokens)
        traced.append(coordinator is not None and coordinator.is_complete_trace())
        return output

    engine._forward = watched
    losses = steps(engine, 3)
    answer = {"drawn": drawn, "counters": counters, "losses": losses, "traced": traced, "weights": work.masters(engine)}
    engine.close()
    return answer


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", [*CONFIGURATIONS, "zero3_offload_cpu"])
def test_the_trial_leaves_no_trace(ranks2, name, dropout):
    """Losses and weights to the last bit, counters, generators, and the micro-batch from which ZeRO-3 fetches ahead."""
    tried, untried = (ranks2.run(trained, name, dropout, tried)[0] for tried in (True, False))
    ours, theirs = tried.pop("weights"), untried.pop("weights")
    assert tried == untried
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    if name.startswith("zero3"):
        assert tried["traced"][1:] == [True] * (len(tried["traced"]) - 1)
