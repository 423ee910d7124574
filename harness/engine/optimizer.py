"""AdamW in the form that fits where the optimizer state lives."""

from __future__ import annotations

from typing import Any

import torch

from harness.config.schema import Optimizer


def build_optimizer(groups: list[dict[str, Any]], settings: Optimizer, *, offloaded: bool, use_gpu: bool) -> torch.optim.Optimizer:
    """AdamW: DeepSpeed's vectorised one under offload, the fused one on a GPU, torch's on a CPU.

    Args:
        groups: parameter groups with their weight decay.
        settings: the section `optimizer` of the run file.
        offloaded: whether the state lives on CPU or NVMe.
        use_gpu: whether the parameters live on a GPU.
    """
    arguments = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, fp32_optimizer_states=True, **arguments)
    if use_gpu:
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **arguments)
    return torch.optim.AdamW(groups, **arguments)
