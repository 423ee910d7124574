"""A model whose loss is its own mean is refused by every rank; an auxiliary loss is taken apart, whatever its coefficient is called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from harness.testing.models import VOCABULARY
from tests.engine import work

SMALL = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
EXPERTS = {
    "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2,
    "output_router_logits": True,
}
FIELDS = {
    "bart": {
        "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "dropout": 0.0, "is_decoder": True,
        "is_encoder_decoder": False,
    },
    "jetmoe": {**EXPERTS, "kv_channels": 8},
    "mixtral": {**EXPERTS, "num_attention_heads": 4},
}


def opened(name: str, kind: str, micro_batch: int) -> Any:
    from transformers import CONFIG_MAPPING

    from harness import distributed
    from harness.engine.zero import ZeroEngine

    run = work.run_file(micro_batch=micro_batch)
    run = run.model_copy(update={"data": run.data.model_copy(update={"packing": "none"})})
    merged = work.ds_config(name, run, ranks=distributed.size(), nvme="")
    return ZeroEngine(run, CONFIG_MAPPING[kind](**SMALL, **FIELDS[kind]), copy.deepcopy(merged), device=torch.device("cpu"), weights=None)


def refusal(name: str, kind: str, coefficient: str | None) -> str:
    from harness.errors import Refused
    from harness.model import judged

    kept, judged._COEFFICIENTS = judged._COEFFICIENTS, (coefficient,) if coefficient else judged._COEFFICIENTS
    try:
        opened(name, kind, 2).close()
    except Refused as refused:
        return str(refused)
    finally:
        judged._COEFFICIENTS = kept
    return "accepted"


def sums(kind: str, micro_batch: int) -> list[tuple[float, float, float]]:
    """Loss, auxiliary loss and gradient norm of two steps, then the loss of an evaluation."""
    from harness import distributed

    engine, found = opened("zero1", kind, micro_batch), []
    batches = [work.batch_of(step, micro_batch=micro_batch) for step in (1, 2)]
    for step, batch in enumerate(batches, 1):
        result = engine.train_step(batch, step=step, lr=work.LR)
        totals = torch.stack([result.loss_sum, result.aux_loss_sum])
        distributed.all_reduce_sum(totals)
        found.append((totals[0].item() / batch.trained_tokens, totals[1].item(), result.grad_norm))
    evaluated = engine.eval_sums(batches[0].micro_batches)
    distributed.all_reduce_sum(evaluated)
    engine.close()
    return [*found, ((evaluated[0] / evaluated[1]).item(), 0.0, 0.0)]


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_all_ranks_refuse_a_loss_that_is_its_own_mean(ranks2, name):
    one, other = ranks2.run(refusal, name, "bart", None, timeout=90.0)
    assert one == other and "'bart' does not become smaller with the number of tokens" in one and "loss_function" in one


def test_an_auxiliary_loss_of_unknown_coefficient_is_refused(ranks2):
    one, other = ranks2.run(refusal, "zero1", "jetmoe", "another_name", timeout=90.0)
    assert one == other and "'jetmoe' does not become smaller" in one


@pytest.mark.parametrize("kind", ["jetmoe", "mixtral"])
def test_an_auxiliary_loss_is_no_part_of_the_loss(ranks1, ranks2, kind):
    """It is a mean over micro-batches, which the cut changes a little; the loss is not."""
    (whole, *_), (parts, *_) = ranks1.run(sums, kind, work.ROWS), ranks2.run(sums, kind, 1)
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-4) and ours[1] == pytest.approx(theirs[1], rel=1e-2)
        assert ours[2] == pytest.approx(theirs[2], rel=1e-2)
    assert whole[0][0] == pytest.approx(5.77, abs=0.05) and whole[0][1] == pytest.approx(2.0, abs=0.1)
