"""Models whose documents see each other in a packed row are found by asking the model, far from what rounding does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.errors import Refused
from harness.model.apart import Influence, influence, refuse_crossing, worst
from harness.model.attention import use_attention
from harness.model.build import DTYPES
from harness.testing.models import ARCHITECTURES, VOCABULARY, tiny_config

MARGIN = 10
SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "hidden_size": 32}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
EXPERTS = {**HEADS, "num_key_value_heads": 2, "intermediate_size": 32, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 8, "pad_token_id": 0}
LEAKY = {
    "falcon": {**HEADS, "ffn_hidden_size": 64},
    "opt": {**HEADS, "ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 0},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"num_hidden_layers": 2, "state_size": 8},
    "gpt_oss": {**EXPERTS, "num_local_experts": 4},
}
APART = {"mixtral": {**EXPERTS, "num_local_experts": 4}, "qwen3_moe": {**EXPERTS, "num_experts": 4}}


def logits_of(config: Any, precision: str, attention: str = "auto") -> Any:
    """(ids, positions) -> logits of fresh weights."""
    from transformers import AutoModelForCausalLM

    use_attention(config, attention, device_type="cpu", precision="fp32", sequence_length=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision]).eval()
    return lambda ids, positions: model(input_ids=ids, position_ids=positions, use_cache=False).logits


def small(kind: str, **more: Any) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**SMALL, **{**LEAKY, **APART}[kind], **more)


def found(model: Any, **options: Any) -> Influence:
    return influence(model, vocabulary=VOCABULARY, device=torch.device("cpu"), **options)


@pytest.mark.parametrize("row_by_row", [False, True])
@pytest.mark.parametrize("std", [0.02, 0.3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind, attention", [(kind, attention) for kind in ARCHITECTURES for attention in ("sdpa", "eager", "varlen")])
def test_documents_stay_apart(kind, attention, precision, std, row_by_row):
    seen = found(logits_of(tiny_config(kind, initializer_range=std), precision, attention), row_by_row=row_by_row)
    assert seen.told and not seen.crosses and MARGIN * seen.onward < seen.allowed
    refuse_crossing(seen, model_type=kind, attention=attention)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", APART)
def test_experts_do_not_couple_tokens(kind, precision):
    seen = found(logits_of(small(kind, initializer_range=0.2), precision))
    assert seen.told and MARGIN * seen.onward < seen.allowed


@pytest.mark.parametrize("row_by_row", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", LEAKY)
def test_a_model_whose_documents_meet_is_found(kind, precision, row_by_row):
    seen = found(logits_of(small(kind), precision), row_by_row=row_by_row)
    assert seen.crosses and seen.onward > MARGIN * seen.allowed
    with pytest.raises(Refused, match=f"of type '{kind}' .* crosses the borders of packed documents") as refusal:
        refuse_crossing(seen, model_type=kind, attention="eager")
    assert "data.packing=none" in refusal.value.remedy


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen"])
def test_positions_that_do_not_restart_are_found(attention):
    model = logits_of(tiny_config("llama"), "fp32", attention)
    seen = found(lambda ids, positions: model(ids, torch.arange(ids.shape[1]).expand_as(positions)))
    assert seen.crosses and seen.onward > MARGIN * seen.allowed


def test_coarse_rounding_is_told_from_a_crossing():
    assert not Influence(onward=2e-3, backward=1e-3).crosses
    assert Influence(onward=2e-3, backward=1e-7).crosses
    assert Influence(onward=0.5, backward=0.5).crosses, "a model that is not causal sees both ways"


def test_logits_that_cannot_tell():
    flat = found(lambda ids, positions: torch.zeros(*ids.shape, VOCABULARY))
    assert not flat.told and not flat.crosses
    leak = Influence(0.2, 0.0)
    assert worst([flat, leak]) == worst([leak, flat]) == leak


def test_the_generators_are_left_alone():
    before = torch.get_rng_state()
    found(lambda ids, positions: torch.nn.functional.one_hot(ids, VOCABULARY).float())
    assert torch.equal(torch.get_rng_state(), before)
