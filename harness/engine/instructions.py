"""What is changed in DeepSpeed's pipeline: randomness keyed per micro-batch, clocks around the work, and tied gradients reduced.

DeepSpeed's `PipelineEngine` runs a schedule of instructions through a map from instruction to method; an engine may have a map
of its own. Nothing of DeepSpeed itself is patched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from harness import distributed
from harness.engine.clock import Clock
from harness.heartbeat import mark


def take_over(engine: Any, clock: Clock, before_forward: Callable[[], None]) -> None:
    """Give a pipeline engine its own map of instructions.

    Args:
        engine: DeepSpeed's `PipelineEngine`.
        clock: told of every forward and backward, and of the update.
        before_forward: called before each forward.
    """
    from deepspeed.runtime.pipe import schedule

    stock = dict(type(engine)._INSTRUCTION_MAP)

    def forward(self: Any, **kwargs: Any) -> None:
        mark("forward")
        before_forward()
        with clock.span("forward"):
            stock[schedule.ForwardPass](self, **kwargs)

    def backward(self: Any, **kwargs: Any) -> None:
        mark("backward")
        with clock.span("backward"):
            stock[schedule.BackwardPass](self, **kwargs)
        self.pipe_buffers["outputs"][kwargs["buffer_id"]] = None  # DeepSpeed keeps the last stage's logits until the buffer's next turn

    def step(self: Any, **kwargs: Any) -> None:
        mark("step")
        with clock.span("update"):
            stock[schedule.OptimizerStep](self, **kwargs)

    engine._INSTRUCTION_MAP = stock | {
        schedule.ForwardPass: forward, schedule.BackwardPass: backward, schedule.ReduceTiedGrads: reduce_tied_gradients,
        schedule.OptimizerStep: step,
    }


def reduce_tied_gradients(engine: Any) -> None:
    """Add up the gradients of a weight that two stages hold, wherever DeepSpeed's optimizer accumulates them.

    DeepSpeed 0.19.8 looks at `weight.grad` alone, which is None when ZeRO-1 with an offloaded optimizer accumulates bf16
    gradients in fp32, and so lets the copies drift apart in silence (deepspeed/runtime/pipe/engine.py, `_exec_reduce_tied_grads`).
    """
    for weight, group in engine.module.get_tied_weights_and_groups():
        distributed.all_reduce_sum(accumulated_gradient(engine, weight), group=group)


def accumulated_gradient(engine: Any, weight: torch.nn.Parameter) -> torch.Tensor:
    """Where the gradient of the whole step stands before it is reduced."""
    if engine.using_bf16_optimizer:
        return weight._hp_grad
    if getattr(engine.optimizer, "use_grad_accum_attribute", False):
        return weight.grad_accum
    return weight.grad
