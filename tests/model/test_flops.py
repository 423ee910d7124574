"""What a model needs for a token, against torch's own count of the operations of a forward and a backward."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.model.attention import layer_heads
from harness.model.flops import flops_per_token, peak_flops
from harness.model.partition import skeleton
from harness.testing.models import tiny_config

LENGTH = 64


def counted(model, length: int) -> float:
    """Operations a token, without a mask: attention is counted over the whole row."""
    ids = torch.randint(0, model.config.vocab_size, (2, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gpt_neox", "mixtral"])
def test_as_torch_counts_them(family):
    from transformers import AutoModelForCausalLM

    config = tiny_config(family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")  # all that torch counts
    no_products = sum(p.numel() for name, p in model.named_parameters() if p.dim() < 2 or "wpe" in name)  # counted all the same, by the convention
    assert flops_per_token(model, LENGTH) == pytest.approx(counted(model, LENGTH) + 6 * no_products, rel=0.005)


def test_a_tied_embedding_counts_once_and_another_not():
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama")
    config.tie_word_embeddings = True
    tied = AutoModelForCausalLM.from_config(config)
    config.tie_word_embeddings = False
    apart = AutoModelForCausalLM.from_config(config)
    assert flops_per_token(tied, LENGTH) == flops_per_token(apart, LENGTH)
    assert sum(p.numel() for p in apart.parameters()) > sum(p.numel() for p in tied.parameters())


def test_layers_whose_heads_differ():
    from transformers import CONFIG_MAPPING

    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    config = CONFIG_MAPPING["gemma4_text"](**sizes, head_dim=8, global_head_dim=16, vocab_size_per_layer_input=320, hidden_size_per_layer_input=8)
    assert layer_heads(config) == [(4, 8)] * 5 + [(4, 16)]
    model = skeleton(config)
    assert flops_per_token(model, 2 * LENGTH) - flops_per_token(model, LENGTH) == 12 * LENGTH * 4 * (5 * 8 + 16)


@pytest.mark.parametrize(("gpu", "precision", "peak"), [
    ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12), ("NVIDIA H100 PCIe", "bf16", 756e12), ("NVIDIA H100 NVL", "fp16", 835e12), ("NVIDIA H200", "bf16", 989.4e12),
    ("NVIDIA A100-SXM4-80GB", "bf16", 312e12), ("NVIDIA GH200 480GB", "bf16", 989.4e12), ("NVIDIA L40S", "bf16", 362e12), ("NVIDIA L4", "bf16", 121e12),
    ("NVIDIA H100 80GB HBM3", "fp32", None), ("Radeon", "bf16", None), ("", "bf16", None),
])
def test_peaks(gpu, precision, peak):
    assert peak_flops(gpu, precision) == peak
