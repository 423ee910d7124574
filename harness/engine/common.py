"""What both engines share: the optimizer's groups, slices of its state, and the one call of `deepspeed.initialize`."""

from __future__ import annotations

import contextlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from harness import distributed
from harness.config.deepspeed import zero
from harness.data.loader import OPENS, TRAINED, UNTRAINED
from harness.engine import loss_scale, slices
from harness.engine.stage0 import guard_stage0, without_a_step
from harness.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from harness.config.schema import RunFile
    from harness.data.loader import Batch, GlobalBatch
    from harness.engine.steps import StepResult


class CommonEngine(ABC):
    """One step interface over DeepSpeed; the loop knows nothing of what is behind it.

    Attributes:
        name: of the engine, as a checkpoint's manifest has it.
        run: the run file.
        device: where this rank computes.
        stage: of ZeRO.
        deepspeed: DeepSpeed's own engine.
    """

    name: str
    run: RunFile
    device: torch.device
    stage: int
    deepspeed: Any

    @abstractmethod
    def train_step(self, batch: GlobalBatch, *, step: int, lr: float) -> StepResult:
        """Forward, backward and update for one global batch."""

    @abstractmethod
    def eval_sums(self, batches: Iterable[Batch]) -> torch.Tensor:
        """Sums over the trained tokens of this rank's micro-batches."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], *, stop_ids: list[int], max_new_tokens: int) -> list[list[int]]:
        """Answer each prompt greedily, on all ranks together."""

    @abstractmethod
    def parameter_names(self) -> dict[int, str]:
        """Identity of each parameter that this rank holds -> its Hugging Face name, tied ones once."""

    @abstractmethod
    def whole_model(self) -> PreTrainedModel:
        """The whole model, for its names, shapes and types; its weights need not be there."""

    def try_model(self) -> None:
        """Refuse a model whose packed documents meet or whose loss is its own mean; an engine that made its weights has done so. Collective."""

    def balance(self) -> str:
        """A sentence about a rank that holds the others up, since the last call, or an empty one. Collective."""
        return ""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, with the hyper-parameters in force."""
        return self.deepspeed.optimizer.param_groups

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group, also of the second optimizer that updates what a partial offload leaves on the GPU."""
        second = getattr(self.deepspeed.optimizer, "backup_optimizer", None)
        for group in [*self.param_groups, *(second.param_groups if second else ())]:
            group["lr"] = lr

    def grad_norm(self) -> float:
        """Gradient norm of the last step before clipping, over all ranks."""
        norm = self.deepspeed.get_global_grad_norm()
        return float(norm if norm is not None else float("nan"))

    def loss_scale(self) -> dict[str, float]:
        """State of dynamic loss scaling, for a checkpoint; empty unless the run is in fp16."""
        return loss_scale.loss_scale_state(self.deepspeed)

    def restore_loss_scale(self, state: dict[str, float]) -> None:
        """Put back what `loss_scale` gave."""
        loss_scale.restore_loss_scale(self.deepspeed, state)

    def hyper_parameters(self) -> dict[str, dict[str, Any]]:
        """Each parameter of which this rank holds a part -> learning rate, decay, betas and epsilon that it is updated with."""
        return slices.hyper_parameters(self.deepspeed, self.parameter_names())

    def named_slices(self, *, to_host: bool = True) -> Iterator[slices.SliceGroup]:
        """The slices of master weights and moments that this rank owns, a bounded group at a time; see `slices.named_slices`."""
        return slices.named_slices(self.deepspeed, self.parameter_names(), to_host=to_host)

    def owned_elements(self) -> list[int]:
        """Elements of the parameters that this rank writes into a checkpoint, by group of `named_slices`."""
        return slices.owned_elements(self.deepspeed, self.parameter_names())

    def held_slices(self) -> list[slices.Slice]:
        """The slices that `load_slices` reads on this rank."""
        return slices.held_slices(self.deepspeed, self.parameter_names())

    def load_slices(self, read: Callable[[str, str, int, int], torch.Tensor], *, step: int) -> None:
        """Take weights and moments from `read(kind, name, offset, length)`; `step` is Adam's step count."""
        slices.load_slices(self.deepspeed, self.parameter_names(), read, step=step)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Copies in host memory of the model's persistent buffers, on the rank that writes them into a checkpoint; on others none."""
        held = _persistent_buffers(self.whole_model()) if distributed.rank() == 0 else {}
        return {name: buffer.to("cpu", copy=True) for name, buffer in held.items()}

    def load_buffers(self, saved: Mapping[str, torch.Tensor], *, where: str) -> None:
        """Take the model's persistent buffers from the checkpoint `where`.

        Raises:
            Refused: when it lacks one.
        """
        held = _persistent_buffers(self.whole_model())
        if lacking := sorted(held.keys() - saved.keys()):
            raise Refused(
                f"The checkpoint, of an earlier version, lacks {len(lacking)} tensors that the model keeps beside its parameters, the first is {lacking[0]}.",
                where=where, remedy="Start a new run in another run_dir.",
            )
        for name, buffer in held.items():
            buffer.copy_(saved[name])

    def parameters(self) -> dict[str, dict[str, Any]]:
        """Shape and dtype of every parameter of the whole model, tied ones once, by its Hugging Face name."""
        return {
            name: {"shape": list(getattr(p, "ds_shape", p.shape)), "dtype": str(p.dtype).removeprefix("torch.")}
            for name, p in self.whole_model().named_parameters()
        }

    def tied(self) -> dict[str, str]:
        """Alias -> name of every parameter that stands in the model twice."""
        first: dict[int, str] = {}
        aliases = {}
        for name, parameter in self.whole_model().named_parameters(remove_duplicate=False):
            if first.setdefault(id(parameter), name) != name:
                aliases[name] = first[id(parameter)]
        return aliases

    def widen(self, batch: Batch) -> dict[str, torch.Tensor]:
        """A batch of the loader as the model takes it, widened on the device.

        Returns:
            input_ids, position_ids, labels: int64 [micro_batch, sequence_length].
        """
        narrow = batch.tokens.view(np.int16) if batch.tokens.dtype == np.uint16 else batch.tokens
        ids = torch.as_tensor(narrow).to(self.device, non_blocking=True).long()
        if batch.tokens.dtype == np.uint16:
            ids &= 0xFFFF
        marks = torch.as_tensor(batch.marks).to(self.device, non_blocking=True)
        places = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
        opened = torch.where((marks & OPENS).bool(), places, 0).cummax(dim=1).values
        return {"input_ids": ids, "position_ids": places - opened, "labels": torch.where((marks & TRAINED).bool(), ids, UNTRAINED)}

    def close(self) -> None:
        """Free DeepSpeed's threads, hooks and swap files."""
        self.deepspeed.destroy()


def _persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a model's files hold beside parameters; no family that is cut into pipeline stages has any."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: held for name, held in model.state_dict().items() if name not in parameters and isinstance(held, torch.Tensor)}


def initialize(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any], *, fp32: bool) -> Any:
    """DeepSpeed's engine, which skips a step with a non-finite gradient whatever its stage and precision.

    Args:
        model: of transformers, or a `PipelineModule`.
        optimizer: over its parameters.
        ds_config: the merged configuration.
        fp32: whether the model is trained in fp32, where DeepSpeed would apply such a step.
    """
    import deepspeed

    fresh = contextlib.nullcontext() if fp32 or zero(ds_config).get("stage", 0) else without_a_step(optimizer)
    with fresh, contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory in 16 bit
        engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    if fp32 and engine.zero_optimization_stage() in (1, 2):
        engine.optimizer.check_grad_overflow = True
    if engine.zero_optimization_stage() in (1, 2) and getattr(engine.optimizer, "cpu_offload", False):
        _forget_broken_gradients(engine.optimizer)
    if fp32 and engine.zero_optimization_stage() == 0:
        guard_stage0(engine)
    return engine


def _forget_broken_gradients(optimizer: Any) -> None:
    """Let a step that is skipped leave no gradients behind.

    With CPU offload DeepSpeed 0.19.8 keeps the sums of such a step (`DeepSpeedZeroOptimizer.step`, deepspeed/runtime/zero/stage_1_and_2.py, clears
    `averaged_gradients` without offload alone), adds those of the next one to them, and so skips every step that follows.
    """
    update = optimizer.step

    def step(*args: Any, **kwargs: Any) -> None:
        update(*args, **kwargs)
        if optimizer.overflow:
            optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))

    optimizer.step = step
