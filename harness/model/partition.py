"""Which blocks each pipeline stage gets: costs of the parts, and the cut that makes the dearest stage as cheap as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from harness.errors import Refused
from harness.model.families import family_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

UNEVEN = 1.2
"""A stage this many times over the mean is worth a warning."""


@dataclass(frozen=True)
class Costs:
    """What the parts of a model cost, in any one unit.

    Attributes:
        embedding: of the first stage.
        blocks: of each block.
        head: of the last stage: its norm and the output embedding.
    """

    embedding: float
    blocks: tuple[float, ...]
    head: float

    def of_stages(self, bounds: tuple[int, ...]) -> list[float]:
        """The cost of each stage of a cut."""
        stages = [sum(self.blocks[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
        stages[0] += self.embedding
        stages[-1] += self.head
        return stages


def balance(costs: Costs, stages: int) -> tuple[int, ...]:
    """Cut the blocks into consecutive stages of at least one block.

    Args:
        costs: of the parts.
        stages: how many; at most as many as there are blocks.

    Returns:
        `stages + 1` bounds: stage s has the blocks bounds[s] to bounds[s + 1]. The dearest stage is as cheap as can be;
        among such cuts, the one with the smallest sum of squares.
    """
    num_blocks = len(costs.blocks)
    assert 1 <= stages <= num_blocks
    sums = [0.0]
    for cost in costs.blocks:
        sums.append(sums[-1] + cost)
    # best[s][b]: (dearest stage, sum of squares, bounds) of the first s stages over the first b blocks
    best: list[dict[int, tuple[float, float, tuple[int, ...]]]] = [{0: (0.0, 0.0, (0,))}]
    for stage in range(1, stages + 1):
        row = {}
        for end in range(stage, num_blocks - (stages - stage) + 1):
            choices = []
            for begin, (dearest, squares, bounds) in best[-1].items():
                if begin < end:
                    cost = sums[end] - sums[begin] + (costs.embedding if stage == 1 else 0.0) + (costs.head if stage == stages else 0.0)
                    choices.append((max(dearest, cost), squares + cost * cost, (*bounds, end)))
            row[end] = min(choices)
        best.append(row)
    return best[stages][num_blocks][2]


def skeleton(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model without a byte of weights (torch's meta device)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def parameter_costs(model: Any) -> Costs:
    """Parameters of the parts; a tied head is counted, since the last stage holds a copy of its own."""
    family = family_of(model.config)
    base = getattr(model, family.base)
    count = {name: sum(p.numel() for p in getattr(base, name).parameters()) for name in [*family.embeddings, family.norm]}
    head = sum(p.numel() for p in model.get_output_embeddings().parameters())
    blocks = tuple(float(sum(p.numel() for p in block.parameters())) for block in getattr(base, family.blocks))
    return Costs(float(sum(count[name] for name in family.embeddings)), blocks, float(count[family.norm] + head))


def flop_costs(model: Any, *, sequence_length: int) -> Costs:
    """Floating-point operations of forward and backward for a token: 6 a parameter, and 12 d T a block for attention.

    Source: PaLM (Chowdhery et al. 2022), appendix B. Looking tokens up costs nothing.
    """
    parameters, width = parameter_costs(model), model.config.get_text_config().hidden_size
    return Costs(0.0, tuple(6 * block + 12 * width * sequence_length for block in parameters.blocks), 6 * parameters.head)


def stage_bounds(config: PretrainedConfig, *, stages: int, method: str, sequence_length: int, measured: Costs | None = None) -> tuple[int, ...]:
    """The cut of a run.

    Args:
        config: of the model.
        stages: of the pipeline.
        method: parameters, flops or time.
        sequence_length: tokens of a row.
        measured: costs in seconds, with `time`.

    Raises:
        Refused: when the family is unknown or has fewer blocks than there are stages.
    """
    model = skeleton(config)
    check_stages(model, stages)
    if method == "time":
        assert measured is not None
        return balance(measured, stages)
    return balance(parameter_costs(model) if method == "parameters" else flop_costs(model, sequence_length=sequence_length), stages)


def check_stages(model: Any, stages: int, *, where: str = "engine.pipeline_stages") -> None:
    """Refuse more stages than blocks.

    Raises:
        Refused: also for an unknown family.
    """
    family = family_of(model.config, where=where)
    num_blocks = len(getattr(getattr(model, family.base), family.blocks))
    if stages > num_blocks:
        raise Refused(
            f"The model has {num_blocks} blocks, too few for {stages} pipeline stages.", where=where, remedy=f"Use at most {num_blocks} stages.",
        )
