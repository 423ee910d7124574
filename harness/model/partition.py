"""Which blocks each pipeline stage gets: costs of the parts, and the cut that makes the dearest stage as cheap as possible."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from harness.errors import Refused
from harness.model.families import family_of
from harness.model.attention import layer_heads

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
    def cost(stage: int, begin: int, end: int) -> float:
        return sums[end] - sums[begin] + (costs.embedding if stage == 0 else 0.0) + (costs.head if stage == stages - 1 else 0.0)

    dearest, _ = _best_cut(num_blocks, stages, cost, max)
    limit = dearest * (1 + 1e-9)
    return _best_cut(num_blocks, stages, lambda *at: value**2 if (value := cost(*at)) <= limit else math.inf, lambda a, b: a + b)[1]


def _best_cut(
    num_blocks: int, stages: int, cost: Callable[[int, int, int], float], join: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """The cut of the smallest joined cost, by dynamic programming over (stage, end); ties go to the earliest bounds."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for stage in range(stages):
        best = {
            end: min((join(value, cost(stage, begin, end)), (*bounds, end)) for begin, (value, bounds) in best.items() if begin < end)
            for end in range(stage + 1, num_blocks - (stages - stage - 1) + 1)
        }
    return best[num_blocks]


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


def flop_costs(model: Any, *, sequence_length: int, recompute_every: int = 0) -> Costs:
    """Floating-point operations of forward and backward for a token: 6 a parameter, and 12 d T a block for attention.

    A block that is recomputed runs its forward twice: a third more. Source: PaLM (Chowdhery et al. 2022), appendix B, where d is
    heads times their width. Looking tokens up costs nothing.
    """
    parameters = parameter_costs(model)
    layers = zip(parameters.blocks, layer_heads(model.config), strict=True)
    blocks = (6 * block + 12 * heads * width * sequence_length for block, (heads, width) in layers)
    recomputed = (4 / 3 if recompute_every and number % recompute_every == 0 else 1.0 for number in range(len(parameters.blocks)))
    return Costs(0.0, tuple(cost * more for cost, more in zip(blocks, recomputed, strict=True)), 6 * parameters.head)


def stage_bounds(
    config: PretrainedConfig, *, stages: int, method: str, sequence_length: int, recompute_every: int = 0, measured: Costs | None = None
) -> tuple[int, ...]:
    """The cut of a run.

    Args:
        config: of the model.
        stages: of the pipeline.
        method: parameters, flops or time.
        sequence_length: tokens of a row.
        recompute_every: every how many blocks one is recomputed; 0 for none.
        measured: costs in seconds, with `time`.

    Raises:
        Refused: when the family is unknown or has fewer blocks than there are stages.
    """
    model = skeleton(config)
    check_stages(model, stages)
    if method == "time":
        assert measured is not None
        return balance(measured, stages)
    if method == "parameters":
        return balance(parameter_costs(model), stages)
    return balance(flop_costs(model, sequence_length=sequence_length, recompute_every=recompute_every), stages)


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
