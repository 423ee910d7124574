"""Floating-point operations of training: what a model needs for a token, and what a GPU can do in a second."""

from __future__ import annotations

import re
from typing import Any

from harness.model.attention import layer_heads

PEAKS = {
    "B200": 2250e12, "H200 NVL": 835e12, "H200": 989.4e12, "GH200": 989.4e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989.4e12, "H800": 989.4e12, "A100": 312e12,
    "A800": 312e12, "L40S": 362e12, "L4": 121e12, "RTX A6000": 154.8e12, "RTX 4090": 165.2e12,
}
"""Operations a second with dense bf16 products that are added up in fp32, by a part of torch's name of the GPU. Source: NVIDIA's data sheets."""
_EXPERT = re.compile(r"\.experts\.")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def flops_per_token(model: Any, sequence_length: int) -> float:
    """Operations of forward and backward for a token, recomputation left out: 6 N + 12 L d T.

    N counts the parameters that a token meets: a tied embedding once, one that is not tied not at all, of experts the share that a token is sent to.
    Attention counts the whole row, whatever part of it a mask leaves. Source: PaLM (Chowdhery et al. 2022), appendix B.

    Args:
        model: the whole model; its weights need not be there.
        sequence_length: tokens of a row, T.
    """
    config = model.config.get_text_config()
    experts = next((count for name in _COUNTS if (count := getattr(config, name, None))), None)
    sent_to = getattr(config, "num_experts_per_tok", None)
    share = sent_to / experts if experts and sent_to else 1.0
    looked_up, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    is_tied = head is not None and head.weight is looked_up
    parameters = 0.0
    for name, parameter in model.named_parameters():
        if parameter is not looked_up or is_tied:
            parameters += getattr(parameter, "ds_numel", parameter.numel()) * (share if _EXPERT.search(name) else 1.0)
    return 6 * parameters + 12 * sum(heads * width for heads, width in layer_heads(config)) * sequence_length


def peak_flops(gpu: str, precision: str) -> float | None:
    """Operations a second that a GPU can do, or None where no data sheet is known, or in fp32.

    Args:
        gpu: torch's name of it, such as `NVIDIA H100 80GB HBM3`.
        precision: of the run: bf16, fp16 or fp32.
    """
    if precision == "fp32":
        return None
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", gpu)), None)
