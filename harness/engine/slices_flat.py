"""Slices under ZeRO-0, 1 and 2, where the model's weights are whole on every rank.

ZeRO-1 and 2 cut each parameter group, flattened, over the ranks; `_hp_mapping` of a parameter tells which part of it
lies where in this rank's cut. Without ZeRO every data-parallel rank holds everything, and the first writes it.
"""

from __future__ import annotations

from typing import Any

import torch

from harness.engine.holdings import Family, Holding, Piece, Slice, require_names
from harness.errors import Failure


class Partitioned(Family):
    """What a rank holds under ZeRO-1 and 2.

    Args:
        optimizer: DeepSpeed's `DeepSpeedZeroOptimizer` or `BF16_Optimizer`.
        names: identity of a parameter -> its name.
        groups: name of the optimizer's list of parameters by group.
        masters: name of its list of this rank's fp32 cuts by group.
    """

    def __init__(self, optimizer: Any, names: dict[int, str], *, groups: str, masters: str):
        require_names(
            optimizer, (groups, masters, "optimizer", "update_lp_params", "_lazy_init_hp_params_optimizer_state")
        )
        super().__init__(
            [
                Holding(optimizer.optimizer, master, _mapped_pieces(group, names))
                for group, master in zip(getattr(optimizer, groups), getattr(optimizer, masters), strict=True)
            ]
        )
        self.optimizer = optimizer

    def end_load(self) -> None:
        """Gather the model's weights from the ranks' masters."""
        self.optimizer.update_lp_params()
        self.optimizer._lazy_init_hp_params_optimizer_state()


class WholeMaster(Holding):
    """An fp32 copy of one or more whole 16-bit parameters."""

    def __init__(
        self,
        base: torch.optim.Optimizer,
        tensor: torch.Tensor,
        parameters: list[torch.nn.Parameter],
        names: dict[int, str],
    ):
        pieces, start = [], 0
        for parameter in parameters:
            pieces.append(_whole_piece(parameter, names, start))
            start += parameter.numel()
        super().__init__(base, tensor, pieces)
        self.parameters = parameters

    def refresh(self) -> None:
        """Round the masters into the model's weights."""
        master = self.tensor.data.view(-1)
        for parameter, piece in zip(self.parameters, self.pieces, strict=True):
            parameter.data.view(-1).copy_(master.narrow(0, piece.start, piece.slice.length))


def whole_fp32(optimizer: torch.optim.Optimizer, names: dict[int, str], *, writes: bool) -> Family:
    """Without ZeRO in fp32 the optimizer updates the model's own parameters; one of its copies `writes` them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return Family([Holding(optimizer, parameter, [_whole_piece(parameter, names, 0)]) for parameter in parameters], writes)


def whole_16bit(optimizer: Any, names: dict[int, str], *, writes: bool) -> Family:
    """Without ZeRO in 16 bit: `FP16_Optimizer` has one master a group, `FP16_UnfusedOptimizer` one a parameter."""
    require_names(optimizer, ("fp16_groups", "optimizer"))
    base, groups = optimizer.optimizer, optimizer.fp16_groups
    if hasattr(optimizer, "fp32_groups_flat"):
        holdings = [
            WholeMaster(base, master, list(group), names)
            for group, master in zip(groups, optimizer.fp32_groups_flat, strict=True)
        ]
        return Family(holdings, writes)
    require_names(optimizer, ("fp32_groups",))
    pairs = [
        pair
        for group, masters in zip(groups, optimizer.fp32_groups, strict=True)
        for pair in zip(group, masters, strict=True)
    ]
    return Family([WholeMaster(base, master, [parameter], names) for parameter, master in pairs], writes)


def _whole_piece(parameter: torch.nn.Parameter, names: dict[int, str], start: int) -> Piece:
    return Piece(Slice(names[id(parameter)], 0, parameter.numel(), tuple(parameter.shape)), start, _is_copy(parameter))


def _is_copy(parameter: torch.nn.Parameter) -> bool:
    return bool(getattr(parameter, "ds_pipe_replicated", False))


def _mapped_pieces(group: list[torch.nn.Parameter], names: dict[int, str]) -> list[Piece]:
    pieces = []
    for parameter in group:
        if not hasattr(parameter, "_hp_mapping"):
            raise Failure(
                f"DeepSpeed linked no master weight to {names[id(parameter)]}; "
                "this harness was proved with DeepSpeed 0.19.8."
            )
        mapping = parameter._hp_mapping
        if mapping is None:
            continue
        model_side, master_side = mapping.lp_fragment_address, mapping.hp_fragment_address
        piece = Slice(names[id(parameter)], model_side.start, model_side.numel, tuple(parameter.shape))
        pieces.append(Piece(piece, master_side.start, _is_copy(parameter)))
    return pieces
