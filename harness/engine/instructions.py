"""What is changed in DeepSpeed's pipeline: randomness keyed per micro-batch, clocks around the work, and tied gradients reduced.

DeepSpeed's `PipelineEngine` runs a schedule of instructions through a map from instruction to method; an engine may have a map
of its own. Nothing of DeepSpeed itself is patched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from harness import distributed
from harness.heartbeat import mark


@dataclass
class Clock:
    """When this rank worked, within one schedule.

    On a GPU the marks are events on its stream, read after the step, so that nothing waits for them.

    Args:
        device: where this rank computes.
    """

    device: torch.device
    started: Any = None
    spans: list[tuple[Any, Any]] = field(default_factory=list)

    def start(self) -> None:
        """The schedule begins."""
        self.started, self.spans = self._mark(), []

    def work(self, action: Callable[[], None]) -> None:
        """Run a forward or a backward."""
        before = self._mark()
        action()
        self.spans.append((before, self._mark()))

    def busy_s(self) -> float:
        """Seconds in forwards and backwards."""
        return sum(self._between(*span) for span in self.spans)

    def window_s(self) -> float:
        """Seconds from the start to the end of the last backward."""
        return self._between(self.started, self.spans[-1][1]) if self.spans else 0.0

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, before: Any, after: Any) -> float:
        if self.device.type != "cuda":
            return after - before
        after.synchronize()
        return before.elapsed_time(after) / 1000


def take_over(engine: Any, clock: Clock, before_forward: Callable[[], None]) -> None:
    """Give a pipeline engine its own map of instructions.

    Args:
        engine: DeepSpeed's `PipelineEngine`.
        clock: told of every forward and backward.
        before_forward: called before each forward.
    """
    from deepspeed.runtime.pipe import schedule

    stock = dict(type(engine)._INSTRUCTION_MAP)

    def forward(self: Any, **kwargs: Any) -> None:
        mark("forward")
        before_forward()
        clock.work(lambda: stock[schedule.ForwardPass](self, **kwargs))

    def backward(self: Any, **kwargs: Any) -> None:
        mark("backward")
        clock.work(lambda: stock[schedule.BackwardPass](self, **kwargs))
        self.pipe_buffers["outputs"][kwargs["buffer_id"]] = None  # DeepSpeed keeps the last stage's logits until the buffer's next turn

    def step(self: Any, **kwargs: Any) -> None:
        mark("step")
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
