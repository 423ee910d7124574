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

        optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, fp32_optimizer_states=True, **arguments)
        optimizer.register_step_pre_hook(_forget_powers)
        return optimizer
    if use_gpu:
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **arguments)
    return torch.optim.AdamW(groups, **arguments)


def _forget_powers(optimizer: Any, *_: Any) -> None:
    """Make the bias correction a function of the step alone, so that a resumed run is the undisturbed one bit for bit.

    DeepSpeed's operator multiplies the powers of the betas on from step to step, and raises them anew only when step or betas are
    not what it saw last (csrc/includes/cpu_adam.h, `IncrementStep`): an update of nothing with other betas makes it do so each time.
    """
    nothing = torch.zeros(1)
    optimizer.ds_opt_adam.adam_update(
        optimizer.opt_id, 1, 0.0, 0.0, 0.0, 1.0, 0.0, False, nothing, nothing.clone(), nothing.clone(), nothing.clone()
    )
