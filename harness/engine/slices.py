"""Named slices of master weights and Adam moments, out of a DeepSpeed engine and back into one, whatever its shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from harness import distributed
from harness.engine.holdings import Family, Holding, Piece, Slice, SliceGroup
from harness.engine.slices_flat import Partitioned, whole_16bit, whole_fp32
from harness.engine.slices_stage3 import Stage3
from harness.errors import Failure, Refused

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

__all__ = ["GROUP_ELEMENTS", "MOMENTS", "Slice", "SliceGroup", "held_slices", "hyper_parameters", "load_slices", "named_slices", "owned_elements"]

HYPER = ("lr", "weight_decay", "betas", "eps")
MOMENTS = ("exp_avg", "exp_avg_sq")
GROUP_ELEMENTS = 1 << 25
"""Elements of each kind that a group holds at most, one slice more than that aside: 384 MiB of state."""

Read = Callable[[str, str, int, int], torch.Tensor]


def named_slices(engine: DeepSpeedEngine, names: dict[int, str], *, to_host: bool = True) -> Iterator[SliceGroup]:
    """The slices that this rank is to write, a bounded group at a time; no collective takes part.

    Args:
        engine: between two optimizer steps; one that has not stepped yet has moments of zero.
        names: identity of each parameter -> the name that it is stored under.
        to_host: False gives tensors where they are and in their own type, for a copy that need not be waited for one by one.

    Raises:
        Failure: when DeepSpeed's optimizer is not one that this was proved with.
        Refused: under `round_robin_gradients`.
    """
    family = _family(engine, names)
    if not family.writes:
        return
    step = max((_adam_step(holding) for holding in family.holdings), default=0)
    for window in family.windows():
        with ExitStack() as stack:
            for holding in window:
                stack.enter_context(holding.open(write=False))
            for portion in _portions(window):
                yield _group(portion, step, to_host=to_host)


def owned_elements(engine: DeepSpeedEngine, names: dict[int, str]) -> list[int]:
    """Elements of the parameters in each group that `named_slices` gives on this rank, each with two moments.

    Raises:
        Failure, Refused: as `named_slices`.
    """
    family = _family(engine, names)
    portions = [portion for window in family.windows() for portion in _portions(window)] if family.writes else []
    return [sum(piece.slice.length for _, piece in portion) for portion in portions]


@torch.no_grad()
def load_slices(engine: DeepSpeedEngine, names: dict[int, str], read: Read, *, step: int) -> None:
    """Put weights and moments into an engine, fresh or trained, and renew the model's own weights. Collective.

    Args:
        engine: between two optimizer steps.
        names: as for `named_slices`.
        read: (kind, name, offset, length) -> 1-D fp32 CPU tensor; kinds are `master`, `exp_avg` and `exp_avg_sq`.
        step: Adam's step count.

    Raises:
        Failure, Refused: as `named_slices`.
    """
    family = _family(engine, names)
    family.begin_load()
    for holding in family.holdings:
        with holding.open(write=True):
            _fill(holding, read, step)
            holding.refresh()
    family.end_load()
    engine.global_steps = step
    engine.global_samples = step * engine.train_batch_size()
    engine.micro_steps = step * engine.gradient_accumulation_steps()


def held_slices(engine: DeepSpeedEngine, names: dict[int, str]) -> list[Slice]:
    """All that `load_slices` will read on this rank.

    Raises:
        Failure, Refused: as `named_slices`.
    """
    return [piece.slice for holding in _family(engine, names).holdings for piece in holding.pieces]


def hyper_parameters(engine: DeepSpeedEngine, names: dict[int, str]) -> dict[str, dict[str, Any]]:
    """Each parameter of which this rank holds a part -> the hyper-parameters that it is updated with.

    Raises:
        Failure, Refused: as `named_slices`.
    """
    holdings = _family(engine, names).holdings
    return {piece.slice.name: {key: holding.group[key] for key in HYPER} for holding in holdings for piece in holding.pieces}


def _family(engine: DeepSpeedEngine, names: dict[int, str]) -> Family:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if engine.zero_round_robin_gradients():
        raise Refused(
            "`round_robin_gradients` moves parameters between ranks so that a checkpoint would hold wrong names.",
            where="zero_optimization.round_robin_gradients",
            remedy="Remove the key from the DeepSpeed configuration.",
        )
    optimizer = engine.optimizer
    writes = engine.mpu.get_data_parallel_rank() == 0 if engine.mpu is not None else distributed.rank() == 0
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        family = Stage3(optimizer, names)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        family = Partitioned(optimizer, names, groups="bit16_groups", masters="single_partition_of_fp32_groups")
    elif isinstance(optimizer, BF16_Optimizer):
        family = Partitioned(optimizer, names, groups="bf16_groups", masters="fp32_groups_flat_partition")
    elif isinstance(optimizer, FP16_Optimizer | FP16_UnfusedOptimizer):
        family = whole_16bit(optimizer, names, writes=writes)
    elif isinstance(optimizer, torch.optim.Optimizer):
        family = whole_fp32(optimizer, names, writes=writes)
    else:
        raise Failure(f"No way is known to take slices out of DeepSpeed's {type(optimizer).__name__}.")
    for holding in family.holdings:
        _require_adam(holding)
    return family


def _require_adam(holding: Holding) -> None:
    unknown = set(holding.base.state.get(holding.tensor) or {}) - {"step", *MOMENTS}
    if unknown:
        raise Failure(
            f"{type(holding.base).__name__} keeps {', '.join(sorted(unknown))}, which a checkpoint has no place for."
        )


def _adam_step(holding: Holding) -> int:
    return int((holding.base.state.get(holding.tensor) or {}).get("step", 0))


def _portions(window: list[Holding]) -> Iterator[list[tuple[Holding, Piece]]]:
    """Pieces in their order, cut into portions of about `GROUP_ELEMENTS`."""
    portion: list[tuple[Holding, Piece]] = []
    elements = 0
    for holding in window:
        for piece in holding.pieces:
            for part in _cut(piece) if not piece.copy else ():
                if portion and elements + part.slice.length > GROUP_ELEMENTS:
                    yield portion
                    portion, elements = [], 0
                portion.append((holding, part))
                elements += part.slice.length
    if portion:
        yield portion


def _cut(piece: Piece) -> Iterator[Piece]:
    whole = piece.slice
    for begin in range(0, whole.length, GROUP_ELEMENTS):
        length = min(GROUP_ELEMENTS, whole.length - begin)
        yield Piece(Slice(whole.name, whole.offset + begin, length, whole.shape), piece.start + begin)


def _group(portion: list[tuple[Holding, Piece]], step: int, *, to_host: bool) -> SliceGroup:
    tensors: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in ("master", *MOMENTS)}
    for holding, piece in portion:
        state = holding.base.state.get(holding.tensor) or {}
        name, length = piece.slice.name, piece.slice.length
        tensors["master"][name] = _view(holding.tensor, piece, to_host)
        for kind in MOMENTS:
            tensors[kind][name] = _view(state[kind], piece, to_host) if kind in state else torch.zeros(length)
    return SliceGroup([piece.slice for _, piece in portion], tensors, step)


def _view(tensor: torch.Tensor, piece: Piece, to_host: bool) -> torch.Tensor:
    view = tensor.detach().view(-1).narrow(0, piece.start, piece.slice.length)
    return view.to("cpu", torch.float32) if to_host else view


def _fill(holding: Holding, read: Read, step: int) -> None:
    """Write master, moments and step of one holding; what is padding becomes zero."""
    state = holding.base.state[holding.tensor]
    plain_torch = type(holding.base).__module__.startswith("torch.optim")
    state["step"] = torch.tensor(float(step), dtype=torch.float32) if plain_torch else step
    for kind in MOMENTS:
        if kind not in state:
            state[kind] = torch.zeros_like(holding.tensor.data, memory_format=torch.contiguous_format)
    for kind, tensor in (("master", holding.tensor), *((kind, state[kind]) for kind in MOMENTS)):
        flat = tensor.data.view(-1)
        flat.zero_()
        for piece in holding.pieces:
            for part in _cut(piece):
                wanted = part.slice
                flat.narrow(0, part.start, wanted.length).copy_(read(kind, wanted.name, wanted.offset, wanted.length))
