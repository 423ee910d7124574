"""The ZeRO engine: a Hugging Face causal language model as it is, under ZeRO-0 to 3, with CPU or NVMe offload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from harness import distributed
from harness.config.deepspeed import offload_device, zero
from harness.config.schema import RunFile
from harness.engine import loss_scale, slices
from harness.engine.optimizer import build_optimizer
from harness.engine.steps import StepResult, seed_micro_batch
from harness.model.build import build, decay_groups, enable_activation_checkpointing

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from harness.data.loader import Batch, GlobalBatch


class ZeroEngine:
    """One step interface over `deepspeed.initialize`.

    Args:
        run: the run file.
        config: configuration of the model.
        ds_config: the merged DeepSpeed configuration.
        device: where this rank computes.
        weights: folder or hub name to load from, or None for fresh weights (also when a checkpoint follows).
    """

    def __init__(self, run: RunFile, config: PretrainedConfig, ds_config: dict[str, Any], *, device: torch.device, weights: str | None):
        self.run, self.config, self.device = run, config, device
        self.stage = int(zero(ds_config).get("stage", 0))
        self._alive = _announce_stage3(ds_config) if self.stage == 3 else None
        self.model = build(
            config, path=weights, precision=run.train.precision, seed=run.train.seed, zero3=self.stage == 3, trust_code=run.model.trust_code
        )
        enable_activation_checkpointing(self.model, run.train.activation_checkpointing)
        offloaded = offload_device(ds_config, "optimizer") != "none"
        optimizer = build_optimizer(
            decay_groups(self.model, run.optimizer.weight_decay), run.optimizer, offloaded=offloaded, use_gpu=device.type == "cuda"
        )
        self.deepspeed = _initialize(self.model, optimizer, ds_config)
        if self.stage in (1, 2) and run.train.precision == "fp32":
            self.deepspeed.optimizer.check_grad_overflow = True  # else DeepSpeed applies a step with infinite gradients in fp32
        self._aux_coefficient = float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0) if getattr(config, "output_router_logits", False) else 0.0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, with the hyper-parameters in force."""
        return self.deepspeed.optimizer.param_groups

    def loss_scale(self) -> dict[str, float]:
        """State of dynamic loss scaling, for a checkpoint; empty unless the run is in fp16."""
        return loss_scale.loss_scale_state(self.deepspeed)

    def restore_loss_scale(self, state: dict[str, float]) -> None:
        """Put back what `loss_scale` gave."""
        loss_scale.restore_loss_scale(self.deepspeed, state)

    def train_step(self, batch: GlobalBatch, *, step: int, lr: float) -> StepResult:
        """Forward, backward and update for one global batch.

        The gradient is that of the mean over the trained tokens of the whole global batch, however it is cut.

        Args:
            batch: this rank's micro-batches and the trained tokens of all ranks.
            step: number of this optimizer step, from 1.
            lr: learning rate of this step.
        """
        for group in self.param_groups:
            group["lr"] = lr
        self.deepspeed.train()
        tokens, ranks = max(batch.trained_tokens, 1), distributed.size()
        share = 1.0 / (ranks * len(batch.micro_batches))
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        aux_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for micro in batch.micro_batches:
            seed_micro_batch(self.run.train.seed, step=step, first_row=micro.first_row)
            output = self._forward(micro, tokens=tokens)
            loss, aux = output.loss, getattr(output, "aux_loss", None)
            if aux is not None and self._aux_coefficient:
                loss_sum += (loss.detach() - self._aux_coefficient * aux.detach()).double() * tokens
                aux_sum += aux.detach().double() * share
                loss = loss - (1.0 - share) * self._aux_coefficient * aux
            else:
                loss_sum += loss.detach().double() * tokens
            self.deepspeed.backward(loss * ranks, scale_wrt_gas=False)
            self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm()
        return StepResult(loss_sum, aux_sum, batch.trained_tokens, float(norm if norm is not None else float("nan")), self.deepspeed.was_step_applied())

    def _forward(self, batch: Batch, *, tokens: int) -> Any:
        return self.deepspeed(
            input_ids=self._put(batch.input_ids), position_ids=self._put(batch.position_ids), labels=self._put(batch.labels),
            use_cache=False, num_items_in_batch=tokens,
        )

    def _put(self, array: Any) -> torch.Tensor:
        tensor = torch.as_tensor(array)
        return tensor.to(self.device, torch.int64, non_blocking=True)

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> torch.Tensor:
        """Sums over the trained tokens of one micro-batch.

        Returns:
            float64 tensor [3] on the device: sum of token losses, trained tokens, tokens whose argmax is right.
        """
        self.deepspeed.eval()
        labels = self._put(batch.labels)
        output = self.deepspeed(
            input_ids=self._put(batch.input_ids), position_ids=self._put(batch.position_ids), labels=labels, use_cache=False, num_items_in_batch=1
        )
        loss = output.loss
        if getattr(output, "aux_loss", None) is not None and self._aux_coefficient:
            loss = loss - self._aux_coefficient * output.aux_loss
        targets = labels[:, 1:]
        trained = targets != -100
        right = (output.logits[:, :-1].argmax(-1) == targets) & trained
        return torch.stack([loss.double(), trained.sum().double(), right.sum().double()])

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], *, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> list[list[int]]:
        """Answer each prompt greedily, on all ranks together, as ZeRO-3 needs it.

        Args:
            prompts: token ids.
            tokenizer: for the end-of-text token.
            max_new_tokens: bound of each answer.

        Returns:
            the new tokens of each prompt.
        """
        self.deepspeed.eval()
        answers = []
        for prompt in prompts:
            ids = torch.tensor([prompt], dtype=torch.int64, device=self.device)
            output = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, use_cache=True,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id, synced_gpus=self.stage == 3,
            )
            answers.append(output[0, len(prompt):].tolist())
        return answers

    def named_slices(self) -> Iterator[slices.SliceGroup]:
        """The slices of master weights and moments that this rank owns, a bounded group at a time."""
        return slices.named_slices(self.deepspeed, self.model)

    def load_slices(self, read: Callable[[str, str, int, int], torch.Tensor], *, step: int) -> None:
        """Take weights and moments from `read(kind, name, offset, length)`; `step` is Adam's step count."""
        slices.load_slices(self.deepspeed, self.model, read, step=step)

    def parameters(self) -> dict[str, dict[str, Any]]:
        """Shape and dtype of every parameter, tied ones once, by its Hugging Face name."""
        return {
            name: {"shape": list(getattr(p, "ds_shape", p.shape)), "dtype": str(p.dtype).removeprefix("torch.")}
            for name, p in self.model.named_parameters()
        }

    def tied(self) -> dict[str, str]:
        """Alias -> name of every parameter that stands in the model twice."""
        first: dict[int, str] = {}
        aliases = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if first.setdefault(id(parameter), name) != name:
                aliases[name] = first[id(parameter)]
        return aliases

    def close(self) -> None:
        """Free DeepSpeed's threads, hooks and swap files."""
        self.deepspeed.destroy()
        self._alive = None


def _announce_stage3(ds_config: dict[str, Any]) -> Any:
    """Tell transformers that parameters are to be partitioned as they are built; the returned object must stay alive."""
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(ds_config)


def _initialize(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any]) -> Any:
    import deepspeed

    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    return engine
