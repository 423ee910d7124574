"""What each pipeline stage gets: blocks, parameters, its share of the work, activations, and how long all wait for each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.config.batch import BatchEquation
from harness.config.schema import RunFile
from harness.model.families import family_of
from harness.model.partition import UNEVEN, flop_costs, parameter_costs, skeleton, stage_bounds

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        first: its first block.
        stop: the block after its last.
        parameters: that it holds, its own copy of a tied embedding included.
        work: its floating-point operations, as a multiple of the mean stage's.
        activations: bytes that it keeps for backward at the worst moment, with all micro-batches in flight.
    """

    first: int
    stop: int
    parameters: int
    work: float
    activations: int


def bubble(stages: int, micro_batches: int) -> float:
    """Share of a step in which a stage waits when all stages take equally long (1F1B; Narayanan et al. 2021, section 2.2)."""
    return (stages - 1) / (micro_batches + stages - 1)


def plan_stages(run: RunFile, config: Any, batch: BatchEquation) -> list[StagePlan]:
    """The stages of a run.

    With `engine.partition: time` the parts are timed on this machine's CPU, and the run will time them anew where it trains.
    """
    model, length = skeleton(config), run.data.sequence_length
    every = run.train.activation_checkpointing
    bounds = stage_bounds(
        config, stages=batch.stages, method=run.engine.partition, sequence_length=length, recompute_every=every, measured=_measured(run, config)
    )
    parameters = parameter_costs(model).of_stages(bounds)
    work = flop_costs(model, sequence_length=length, recompute_every=every).of_stages(bounds)
    mean = sum(work) / len(work)
    stages = []
    for stage, (first, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        kept = _activation_bytes(run, config, num_blocks=stop - first, is_last=stop == bounds[-1])
        in_flight = min(batch.stages - stage, batch.accumulation)
        stages.append(StagePlan(first, stop, round(parameters[stage]), work[stage] / mean, kept * in_flight))
    return stages


def warnings(stages: list[StagePlan]) -> list[str]:
    """A sentence for each stage that is much dearer than the mean."""
    return [
        f"Stage {number} has {stage.work:.2f} times the mean work: the others will wait for it. Use another number of stages or engine.partition."
        for number, stage in enumerate(stages) if stage.work > UNEVEN
    ]


def _measured(run: RunFile, config: Any) -> Any:
    if run.engine.partition != "time":
        return None
    import torch

    from harness.model.build import DTYPES
    from harness.model.measure import time_costs

    family_of(config)
    return time_costs(
        config, dtype=DTYPES[run.train.precision], device=torch.device("cpu"), micro_batch=run.train.micro_batch, sequence_length=run.data.sequence_length,
        recompute_every=run.train.activation_checkpointing,
    )


def _activation_bytes(run: RunFile, config: Any, *, num_blocks: int, is_last: bool) -> int:
    """Bytes that one micro-batch leaves behind in a stage.

    34 bytes a block, token and width in 16 bit, without the attention matrix, which no fused attention keeps; 2 where the block is
    recomputed (Korthikanti et al. 2022, section 4.1). The last stage adds its logits and their copy in fp32.
    """
    text, size = config.get_text_config(), _BYTES[run.train.precision]
    tokens, every = run.train.micro_batch * run.data.sequence_length, run.train.activation_checkpointing
    recomputed = 0 if every == 0 else -(-num_blocks // every)
    per_width = (num_blocks - recomputed) * 17 * size + recomputed * size
    return tokens * (per_width * text.hidden_size + (text.vocab_size * (size + 4) if is_last else 0))
