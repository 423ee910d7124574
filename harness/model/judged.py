"""Whether a model's loss is a sum over tokens by the number it is told; asked of the model itself, for some take their own mean in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from harness.errors import Refused

_MANY = 2**40
_ROUNDING = 1e-4
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def aux_coefficient(model: Any) -> float:
    """By what the auxiliary loss of a model's experts is multiplied before it is added to the loss; 0 where that is not known."""
    places = (model, model.config.get_text_config(), model.config)
    found = (getattr(place, name, None) for place in places for name in _COEFFICIENTS)
    return float(next((value for value in found if value is not None), 0.0))


@torch.no_grad()
def left_over(
    judged: Callable[[dict[str, torch.Tensor], int], Any], *, coefficient: float, vocabulary: int, device: torch.device, shape: tuple[int, int]
) -> float:
    """What stays of the loss of some rows, beside the auxiliary loss, when it is told of very many tokens: 0 where it is a sum over tokens.

    Args:
        judged: (inputs, tokens) -> what the model answers; in eval mode.
        coefficient: of the auxiliary loss.
        vocabulary: tokens are below it.
        device: where the model computes.
        shape: rows and tokens of each.

    Raises:
        Refused: where the model cannot be told.
    """
    ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(device)
    inputs = {"input_ids": ids, "position_ids": torch.arange(shape[1], device=device).repeat(shape[0], 1), "labels": ids.clone()}
    try:
        output = judged(inputs, _MANY)
    except TypeError as error:
        if "num_items_in_batch" not in str(error):
            raise
        raise Refused(f"The model's forward does not take the number of trained tokens: {error}", where="model", remedy=_REMEDY) from None
    aux = getattr(output, "aux_loss", None)
    return abs(float(output.loss if aux is None else output.loss - coefficient * aux))


def refuse_own_mean(found: list[float], *, model_type: str) -> None:
    """Raise what the user can mend.

    Args:
        found: of all ranks, what `left_over` gave; a loss that is not a number cannot tell.
        model_type: of the configuration.

    Raises:
        Refused: when the loss is more than the sum over tokens and a known auxiliary loss.
    """
    if any(loss > _ROUNDING for loss in found):
        raise Refused(
            f"The loss of a model of type {model_type!r} does not become smaller with the number of tokens that it is told (num_items_in_batch): "
            f"{max(found):.3g} is left. It takes a mean of its own, or adds something that its configuration does not tell, "
            "so that what it learns would depend on the cut into micro-batches.", where="model", remedy=_REMEDY,
        )


_REMEDY = (
    "Let the model compute its loss with `self.loss_function(..., **kwargs)` of transformers; turn off what is added to it, such as a z-loss "
    "(z_loss_coefficient=0), or tell the coefficient of its auxiliary loss as router_aux_loss_coef."
)
