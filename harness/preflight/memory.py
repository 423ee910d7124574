"""How many bytes a run needs on each GPU, host and NVMe, from the configuration alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from harness.config.deepspeed import offload_device, zero

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of model and optimizer states; activations and buffers come on top.

    Attributes:
        device: on each GPU (or in each rank's memory on a CPU).
        host: on each host, over its ranks.
        nvme: on each host's NVMe.
        checkpoint: of one checkpoint, over all ranks.
        copy: on each host, of the copy from which a checkpoint is written while training goes on.
    """

    device: int
    host: int
    nvme: int
    checkpoint: int
    copy: int


def plan_memory(
    parameters: int, ds_config: dict[str, Any], *, precision: str, ranks: int, local_ranks: int, all_parameters: int | None = None
) -> MemoryPlan:
    """Place weights, gradients, masters and moments (ZeRO paper, section 3; Adam: 12 bytes a parameter in fp32).

    Args:
        parameters: trained parameters of the model, or of the largest of its pipeline stages.
        ds_config: the merged DeepSpeed configuration.
        precision: fp32, bf16 or fp16.
        ranks: data-parallel ranks.
        local_ranks: ranks on one host.
        all_parameters: of the whole model, where `parameters` is a stage's.
    """
    stage = int(zero(ds_config).get("stage", 0))
    weights = parameters * _BYTES[precision] / (ranks if stage >= 3 else 1)
    gradients = parameters * 4 / (ranks if stage >= 2 else 1)
    optimizer = parameters * (8 if precision == "fp32" else 12) / (ranks if stage >= 1 else 1)
    placed = {"none": 0.0, "cpu": 0.0, "nvme": 0.0}
    placed[offload_device(ds_config, "param")] += weights
    placed[offload_device(ds_config, "optimizer")] += optimizer
    placed["cpu" if offload_device(ds_config, "optimizer") != "none" else "none"] += gradients
    checkpoint = 12 * (all_parameters or parameters)
    copied = 12 * parameters / ranks * local_ranks if stage >= 1 else 12 * parameters * math.ceil(local_ranks / ranks)  # without ZeRO one copy writes
    return MemoryPlan(
        device=round(placed["none"]), host=round(placed["cpu"] * local_ranks), nvme=round(placed["nvme"] * local_ranks), checkpoint=checkpoint,
        copy=min(checkpoint, round(copied)),
    )
