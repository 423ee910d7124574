"""ZeRO-0: in fp32 DeepSpeed leaves out the gradient norm of later pipeline stages and applies non-finite steps, in 16 bit it begins with a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch

from harness import distributed


def guard_stage0(engine: Any) -> None:
    """Take over clipping: the norm is that of all stages, tied weights counted once, and a non-finite step is not applied.

    DeepSpeed's `clip_grad_norm_` (deepspeed/runtime/utils.py) counts stage 0 alone unless parameters are marked for tensor
    parallelism, and keeps the norm to itself.

    Args:
        engine: DeepSpeed's, whose optimizer is the base optimizer itself.
    """
    optimizer, update = engine.optimizer, engine.optimizer.step

    def step(self: Any, *args: Any, **kwargs: Any) -> None:
        norm = _global_norm(engine)
        self._global_grad_norm = norm
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return
        limit = engine.gradient_clipping()
        if limit > 0.0:
            share = (limit / (norm + 1e-6)).clamp(max=1.0)
            for parameter in _gradients(engine, copies=True):
                parameter.grad.mul_(share)
        update(*args, **kwargs)

    optimizer.step = MethodType(step, optimizer)
    engine.clip_fp32_gradients = lambda: None


@contextmanager
def without_a_step(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Keep DeepSpeed from updating while it is built.

    `initialize_optimizer_states` (deepspeed/runtime/fp16/fused_optimizer.py and unfused_optimizer.py) takes a step without gradients to make room
    for the moments: it decays the masters at the peak learning rate, and Adam then corrects its bias as of the second step.
    """
    optimizer.step = lambda *_: None
    try:
        yield
    finally:
        del optimizer.step


def _gradients(engine: Any, *, copies: bool) -> list[torch.nn.Parameter]:
    return [p for p in engine.module.parameters() if p.grad is not None and (copies or not getattr(p, "ds_pipe_replicated", False))]


def _global_norm(engine: Any) -> torch.Tensor:
    squares = torch.zeros((), device=engine.device)
    for parameter in _gradients(engine, copies=False):
        squares += parameter.grad.float().pow(2).sum()
    if engine.mpu is not None:
        distributed.all_reduce_sum(squares, group=engine.mpu.get_model_parallel_group())
    return squares.sqrt()
