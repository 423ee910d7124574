"""The size of a model without its weights."""

from __future__ import annotations

from typing import Any


def count_parameters(config: Any) -> int:
    """Parameters of the model that `config` describes, tied ones once; built on torch's meta device, so it costs no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())
