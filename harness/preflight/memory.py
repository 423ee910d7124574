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
    """Place weights, gradients, masters and moments at the moment of a step in which they take most.

    Divided as the ZeRO paper says (section 3), and as DeepSpeed 0.19.8 holds them (deepspeed/runtime/zero): from ZeRO-1 on Adam takes 12 bytes
    a parameter in every precision.

    Args:
        parameters: trained parameters of the model, or of the largest of its pipeline stages.
        ds_config: the merged DeepSpeed configuration.
        precision: fp32, bf16 or fp16.
        ranks: data-parallel ranks.
        local_ranks: ranks on one host.
        all_parameters: of the whole model, where `parameters` is a stage's.
    """
    stage = int(zero(ds_config).get("stage", 0))
    width, offload = _BYTES[precision], offload_device(ds_config, "optimizer")
    placed = {"none": 0.0, "cpu": 0.0, "nvme": 0.0}
    placed[offload_device(ds_config, "param")] += parameters * width / (ranks if stage >= 3 else 1)
    placed[offload] += parameters * (8 if stage == 0 and precision == "fp32" else 12) / (ranks if stage >= 1 else 1)
    for place, held in _gradients(ds_config, precision=precision, ranks=ranks, group=min(1.0, _sub_group(ds_config) * ranks / parameters)).items():
        placed[place] += parameters * held
    checkpoint = 12 * (all_parameters or parameters)
    copied = 12 * parameters / ranks * local_ranks if stage >= 1 else 12 * parameters * math.ceil(local_ranks / ranks)  # without ZeRO one copy writes
    return MemoryPlan(
        device=round(placed["none"]), host=round(placed["cpu"] * local_ranks), nvme=round(placed["nvme"] * local_ranks), checkpoint=checkpoint,
        copy=min(checkpoint, round(copied)),
    )


def _sub_group(ds_config: dict[str, Any]) -> float:
    """Parameters that a rank updates at once under ZeRO-3."""
    return float(zero(ds_config).get("sub_group_size", 1e9))


def _gradients(ds_config: dict[str, Any], *, precision: str, ranks: int, group: float) -> dict[str, float]:
    """Bytes a parameter of gradients and of their copies on one rank, by place, and of the buffers through which states come from NVMe.

    Args:
        ds_config: the merged DeepSpeed configuration.
        precision: fp32, bf16 or fp16.
        ranks: data-parallel ranks.
        group: share of its own parameters that a rank updates at once under ZeRO-3.
    """
    stage, width, offload = int(zero(ds_config).get("stage", 0)), _BYTES[precision], offload_device(ds_config, "optimizer")
    summed = 4 if ds_config.get("data_types", {}).get("grad_accum_dtype") == "fp32" else width
    if stage == 0:
        return {"none": summed + (0 if width == 4 else 4)}  # in fp32 for the update
    if stage == 3:
        swapped = 4 * (zero(ds_config).get("offload_optimizer") or {}).get("buffer_count", 4)
        held = {"none": {"none": summed + 4 * group}, "cpu": {"cpu": summed + 4}, "nvme": {"cpu": summed + swapped * group, "nvme": 4}}[offload]
        return {place: each / ranks for place, each in held.items()}
    apart = 4 if summed != width else 0  # this rank's part of the sums
    again = width if ds_config.get("gradient_accumulation_steps", 1) > 1 else 0  # of a micro-batch, beside the sums
    host = (4 + width) / ranks  # in fp32 for the update, and the new weights
    if stage == 2 and offload == "none":
        return {"none": (summed + (width if apart else 4)) / ranks}
    if stage == 2:
        return {"none": (apart + again) / ranks, "cpu": host + (0 if apart else again) / ranks}
    if offload != "none":
        return {"none": summed + apart / ranks, "cpu": host}  # all sums are there until each rank has its part
    if apart and precision == "bf16":
        return {"none": summed + width}  # BF16_Optimizer keeps what backward left
    return {"none": summed + apart / ranks if apart else max(summed, (summed + 4) / ranks)}
