"""Slices under ZeRO-3: each parameter is cut over the ranks, and sub-groups of the cuts may live on NVMe.

The parameters of `fp16_groups[i]` lie one after another in `fp32_partitioned_groups_flat[i]`, each as long as its own
cut, padding included; a cut starts at its length times the rank in the parameter's group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harness.engine.holdings import Family, Holding, Piece, Slice, require_names

_NAMES = (
    "fp16_groups",
    "fp32_partitioned_groups_flat",
    "fp16_partitioned_groups_flat",
    "optimizer",
    "persistent_parameters",
    "sub_group_to_group_id",
    "_get_param_partition_rank",
    "_swappable_optimizer_subgroup",
    "_optimizer_states_and_gradient_swap_in",
    "_optimizer_states_and_gradient_swap_out",
    "_release_swap_buffers",
    "_reassign_or_swap_out_partitioned_parameters",
    "_partition_all_parameters",
    "invalidate_secondary_tensor",
)


class SubGroup(Holding):
    """One sub-group of ZeRO-3, which is swapped in while it is open."""

    def __init__(self, optimizer: Any, index: int, names: dict[int, str]):
        super().__init__(
            _base(optimizer, index), optimizer.fp32_partitioned_groups_flat[index], _pieces(optimizer, index, names)
        )
        self.optimizer, self.index = optimizer, index
        self.swapped = bool(optimizer._swappable_optimizer_subgroup(index))

    @property
    def group(self) -> dict[str, Any]:
        """DeepSpeed puts a sub-group into the optimizer's group only while it is updated."""
        return self.base.param_groups[self.optimizer.sub_group_to_group_id[self.index]]

    @contextmanager
    def open(self, *, write: bool) -> Iterator[None]:
        """Read the sub-group from NVMe; with `write` it is written back."""
        if not self.swapped:
            yield
            return
        self.optimizer._optimizer_states_and_gradient_swap_in(self.index)
        try:
            yield
        except BaseException:
            self.optimizer._release_swap_buffers(self.index)
            raise
        if write:
            self.optimizer._optimizer_states_and_gradient_swap_out(self.index)
        else:
            self.optimizer._release_swap_buffers(self.index)

    def refresh(self) -> None:
        """Copy the master into this rank's cuts of the model's weights, in memory or on NVMe."""
        self.optimizer._reassign_or_swap_out_partitioned_parameters(self.index)


class Stage3(Family):
    """What a rank holds under `DeepSpeedZeroOptimizer_Stage3`."""

    def __init__(self, optimizer: Any, names: dict[int, str]):
        require_names(optimizer, _NAMES)
        super().__init__([SubGroup(optimizer, index, names) for index in range(len(optimizer.fp16_groups))])
        self.optimizer = optimizer

    def windows(self) -> Iterator[list[Holding]]:
        """Sub-groups on NVMe one by one, then those in memory together."""
        yield from ([holding] for holding in self.holdings if holding.swapped)
        yield [holding for holding in self.holdings if not holding.swapped]

    def begin_load(self) -> None:
        """Give up what is gathered of the old weights."""
        self.optimizer._partition_all_parameters()

    def end_load(self) -> None:
        """Gather the parameters that stay whole on every rank."""
        self.optimizer.invalidate_secondary_tensor()
        persistent = self.optimizer.persistent_parameters
        if len(persistent) > 0:
            persistent[0].all_gather(persistent)


def _base(optimizer: Any, index: int) -> Any:
    """The optimizer that holds the sub-group's moments; a second one has the share that DeepSpeed leaves on the GPU."""
    devices = getattr(optimizer, "subgroup_to_device", None) or {}
    return optimizer.optimizer if devices.get(index, "cpu") == "cpu" else optimizer.backup_optimizer


def _pieces(optimizer: Any, index: int, names: dict[int, str]) -> list[Piece]:
    pieces, start = [], 0
    for parameter in optimizer.fp16_groups[index]:
        cut = parameter.ds_tensor.ds_numel
        offset = cut * optimizer._get_param_partition_rank(parameter)
        length = min(cut, parameter.ds_numel - offset)
        if length > 0:
            pieces.append(Piece(Slice(names[id(parameter)], offset, length, tuple(parameter.ds_shape)), start))
        start += cut
    return pieces
