"""Whether a model keeps the documents of a packed row apart; asked of the model itself, because transformers lets some cross in silence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from harness.errors import Refused

PIECE = 8
"""Tokens of a piece."""
FLEX_PIECE = 128
"""The same for flex attention: its kernel for fewer tokens is another one than training's."""

_FLOOR, _CEILING, _MARGIN = 1e-4, 1e-2, 10.0


@dataclass(frozen=True)
class Influence:
    """Of one piece of a row on the other: change of the other's logits as a share of its own change (L2); NaN where its own do not change.

    Measured with transformers 5.23, fresh weights (std 0.02 and 0.2), fp32 and bf16, on a CPU. 37 families that keep pieces apart:
    exactly 0, or with several threads up to 4e-7 (experts, fp32). Those that do not: from a width of 256 on 0.01 (a short convolution) to
    0.9; at a width of 32 at least 2e-4 (lfm2's convolution), 6e-4 (jamba), 3e-3 (bloom), 0.1 (falcon, opt, mpt, mamba, gpt_oss).

    Attributes:
        onward: of the first on the second: 0 where attention stays within pieces.
        backward: of the second on the first: in a causal model nothing but rounding, whatever computes attention.
    """

    onward: float
    backward: float

    @property
    def allowed(self) -> float:
        """What rounding may do: a floor, or where rounding is coarser ten times what it was seen to do, up to a ceiling."""
        return min(max(_FLOOR, _MARGIN * self.backward), _CEILING)

    @property
    def crosses(self) -> bool:
        """Whether the second piece sees the first."""
        return self.onward > self.allowed

    @property
    def told(self) -> bool:
        """Whether the logits were finite and depended on the tokens, so that there was something to see."""
        return math.isfinite(self.onward)


@torch.no_grad()
def influence(
    logits_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *, vocabulary: int, device: torch.device, piece: int = PIECE, row_by_row: bool = False
) -> Influence:
    """What the two pieces of a row do to each other, from one forward pass over three rows.

    The second row has other tokens in its first piece, the third in its second. A token that is masked contributes exactly nothing, and
    rows of one pass go through the same kernels, so that little but a crossing can make a difference.

    Args:
        logits_of: (input_ids, position_ids), int64 [rows, 2 * piece] -> logits [rows, 2 * piece, vocabulary]; of a model in eval mode.
        vocabulary: tokens are below it.
        device: where the model computes.
        piece: tokens of a piece.
        row_by_row: one row a pass, as in a run whose micro-batches are one row: transformers' flash attention keeps pieces apart only then.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (2, piece), generator=generator)
    others = (tokens + torch.randint(1, vocabulary, (2, piece), generator=generator)) % vocabulary
    rows = torch.stack([torch.cat(pair) for pair in ((tokens[0], tokens[1]), (others[0], tokens[1]), (tokens[0], others[1]))])
    positions = torch.arange(piece).repeat(2).expand(3, -1).contiguous()
    rows_a_pass = 1 if row_by_row else 3
    passes = zip(rows.to(device).split(rows_a_pass), positions.to(device).split(rows_a_pass), strict=True)
    logits = torch.cat([logits_of(*inputs) for inputs in passes]).double()
    onward, backward = logits[0] - logits[1], logits[0] - logits[2]
    return Influence(_share(onward[piece:], onward[:piece]), _share(backward[:piece], backward[piece:]))


def _share(change: torch.Tensor, own: torch.Tensor) -> float:
    return (change.norm() / own.norm()).item()


def worst(found: list[Influence]) -> Influence:
    """The one of all ranks that is judged, so that they agree."""
    return max(found, key=lambda one: (one.crosses, one.onward))


def refuse_crossing(found: Influence, *, model_type: str, attention: str) -> None:
    """Raise what the user can mend.

    Args:
        found: the worst of all ranks.
        model_type: of the configuration.
        attention: what the model computes it with.

    Raises:
        Refused: when documents see each other.
    """
    if found.crosses:
        flash = ", or micro-batches of one row for training and evaluation" if attention.startswith("flash") else ""
        raise Refused(
            f"The attention of a model of type {model_type!r} ({attention}) crosses the borders of packed documents: other tokens in one document "
            f"change the logits of the next, by {found.onward:.2g} of the change of its own, and {found.allowed:.1g} would be rounding.",
            where="data.packing, model.attention",
            remedy=f"Set data.packing=none, one document a row, or another model.attention (sdpa, eager) if this one was chosen by hand{flash}.",
        )
