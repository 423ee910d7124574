"""The ZeRO engine: a Hugging Face causal language model as it is, under ZeRO-0 to 3, with CPU or NVMe offload."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from harness import distributed
from harness.config.deepspeed import offload_device, zero
from harness.config.schema import RunFile
from harness.engine.clock import Clock
from harness.engine.common import CommonEngine, initialize
from harness.engine.holdings import parameter_names
from harness.engine.optimizer import build_optimizer
from harness.engine.steps import StepResult, evaluation_sums, seed_micro_batch
from harness.errors import Refused
from harness.heartbeat import mark
from harness.log import say
from harness.model.apart import FLEX_PIECE, PIECE, influence, refuse_crossing, worst
from harness.model.attention import use_attention
from harness.model.build import build, decay_groups, enable_activation_checkpointing
from harness.model.head import use_chunked_loss
from harness.model.judged import aux_coefficient, left_over, refuse_own_mean

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from harness.data.loader import Batch, GlobalBatch


class ZeroEngine(CommonEngine):
    """One step interface over `deepspeed.initialize`.

    Args:
        run: the run file.
        config: configuration of the model.
        ds_config: the merged DeepSpeed configuration.
        device: where this rank computes.
        weights: folder or hub name to load from, or None for fresh weights.
        fresh: False where a checkpoint follows, so that no weights need be made.
    """

    name = "zero"

    def __init__(
        self, run: RunFile, config: PretrainedConfig, ds_config: dict[str, Any], *, device: torch.device, weights: str | None, fresh: bool = True
    ):
        self.run, self.config, self.device = run, config, device
        self.stage = int(zero(ds_config).get("stage", 0))
        use_attention(
            config, run.model.attention, device_type=device.type, precision=run.train.precision, sequence_length=run.data.sequence_length
        )
        self._alive = _announce_stage3(ds_config) if self.stage == 3 else None
        self.model = build(
            config, path=weights, precision=run.train.precision, seed=run.train.seed, zero3=self.stage == 3, trust_code=run.model.trust_code,
            fresh=fresh,
        )
        enable_activation_checkpointing(self.model, run.train.activation_checkpointing)
        self._head = use_chunked_loss(self.model, run.model.loss, on_gpu=device.type == "cuda")
        offloaded = offload_device(ds_config, "optimizer") != "none"
        optimizer = build_optimizer(
            decay_groups(self.model, run.optimizer.weight_decay), run.optimizer, offloaded=offloaded, use_gpu=device.type == "cuda"
        )
        if self.stage == 3:
            _gather_by_block(self.model)
        self.deepspeed = initialize(self.model, optimizer, ds_config, fp32=run.train.precision == "fp32")
        self._aux_coefficient = aux_coefficient(self.model)
        if fresh:
            self.try_model()

    def try_model(self) -> None:
        """Try the model on short rows, on all ranks together; all refuse it if its loss is its own mean or packed documents see each other."""
        training, flex = self.deepspeed.training, self.config._attn_implementation == "flex_attention"
        piece = min(FLEX_PIECE if flex else PIECE, self.run.data.sequence_length // 2)
        row_by_row = max(self.run.train.micro_batch, self.run.evaluation.micro_batch or 1) == 1
        self.deepspeed.eval()
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                self._try_loss((1 if row_by_row else 3, 2 * piece))
                if self.run.data.packing != "none":
                    self._try_documents(piece, row_by_row=row_by_row)
        except Refused:
            self.close()
            raise
        self.deepspeed.train(training)
        self._forget_trial(compiled=flex)

    def _try_loss(self, shape: tuple[int, int]) -> None:
        mine = left_over(
            lambda inputs, tokens: self._judged(inputs, tokens=tokens), coefficient=self._aux_coefficient,
            vocabulary=self.config.get_text_config().vocab_size, device=self.device, shape=shape,
        )
        refuse_own_mean(distributed.gather_objects(mine), model_type=self.config.model_type)

    def _try_documents(self, piece: int, *, row_by_row: bool) -> None:
        started, attention = time.perf_counter(), self.config._attn_implementation
        mine = influence(
            lambda ids, positions: self.deepspeed(input_ids=ids, position_ids=positions, use_cache=False).logits,
            vocabulary=self.config.get_text_config().vocab_size, device=self.device, piece=piece, row_by_row=row_by_row,
        )
        found = worst(distributed.gather_objects(mine))
        refuse_crossing(found, model_type=self.config.model_type, attention=attention)
        seen = "stay apart" if found.told else "may not stay apart: fresh logits that are not finite or do not depend on tokens cannot tell"
        say(f"Documents of a packed row {seen} ({attention}, tried in {time.perf_counter() - started:.2f} s).")

    def _forget_trial(self, *, compiled: bool) -> None:
        """Let the first micro-batch be what ZeRO-3's trace of modules and flex attention's compiled shapes begin with."""
        if self.stage == 3:
            coordinator = self.deepspeed.optimizer.parameter_offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()
        if compiled:
            torch.compiler.reset()

    def train_step(self, batch: GlobalBatch, *, step: int, lr: float) -> StepResult:
        """Forward, backward and update for one global batch.

        The gradient is that of the mean over the trained tokens of the whole global batch, however it is cut.

        Args:
            batch: this rank's micro-batches and the trained tokens of all ranks.
            step: number of this optimizer step, from 1.
            lr: learning rate of this step.
        """
        self.set_lr(lr)
        self.deepspeed.train()
        tokens, ranks = max(batch.trained_tokens, 1), distributed.size()
        share, clock = 1.0 / (ranks * len(batch.micro_batches)), Clock(self.device)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        aux_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for micro in batch.micro_batches:
            mark("forward", step)
            seed_micro_batch(self.run.train.seed, step=step, first_row=micro.first_row)
            with clock.span("forward"):
                output = self._forward(micro, tokens=tokens)
            loss, aux = output.loss, getattr(output, "aux_loss", None)
            if aux is not None:
                loss_sum += (loss.detach() - self._aux_coefficient * aux.detach()).double() * tokens
                aux_sum += aux.detach().double() * share
                loss = loss - (1.0 - share) * self._aux_coefficient * aux
            else:
                loss_sum += loss.detach().double() * tokens
            mark("backward")
            with clock.span("backward"):
                self.deepspeed.backward(loss * ranks, scale_wrt_gas=False)
            mark("step")
            with clock.span("update"):
                self.deepspeed.step()
        return StepResult(
            loss_sum, aux_sum, batch.trained_tokens, self.grad_norm(), self.deepspeed.was_step_applied(), seconds=clock.seconds
        )

    def _forward(self, batch: Batch, *, tokens: int) -> Any:
        return self._judged(self.widen(batch), tokens=tokens)

    def _judged(self, inputs: dict[str, torch.Tensor], *, tokens: int) -> Any:
        with self._head.judging(inputs["labels"]) if self._head is not None else nullcontext():
            return self.deepspeed(**inputs, use_cache=False, num_items_in_batch=tokens)

    @torch.no_grad()
    def eval_sums(self, batches: Iterable[Batch]) -> torch.Tensor:
        """Sums over the trained tokens of this rank's micro-batches; every rank must have equally many.

        Returns:
            float64 tensor [3] on the device: sum of token losses, trained tokens, tokens whose argmax is right.
        """
        self.deepspeed.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        mark("evaluate")
        for batch in batches:
            mark("evaluate")
            sums += self._eval_sums(batch)
        return sums

    def _eval_sums(self, batch: Batch) -> torch.Tensor:
        inputs = self.widen(batch)
        output = self._judged(inputs, tokens=1)
        loss, aux = output.loss, getattr(output, "aux_loss", None)
        if aux is not None:
            loss = loss - self._aux_coefficient * aux
        return evaluation_sums(loss, output.logits, inputs["labels"], judged=self._head is not None)

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], *, stop_ids: list[int], max_new_tokens: int) -> list[list[int]]:
        """Answer each prompt greedily, on all ranks together, as ZeRO-3 needs it.

        Args:
            prompts: token ids.
            stop_ids: tokens that end an answer.
            max_new_tokens: bound of each answer.

        Returns:
            the new tokens of each prompt.
        """
        self.deepspeed.eval()
        answers = []
        for prompt in prompts:
            mark("generate")
            ids = torch.tensor([prompt], dtype=torch.int64, device=self.device)
            output = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, use_cache=True,
                eos_token_id=stop_ids, pad_token_id=stop_ids[0], synced_gpus=self.stage == 3,
            )
            answers.append(output[0, len(prompt):].tolist())
        return answers

    def parameter_names(self) -> dict[int, str]:
        """Identity of each parameter -> its name, tied ones once."""
        return parameter_names(self.model)

    def whole_model(self) -> PreTrainedModel:
        """The model itself; under ZeRO-3 its parameters are empty and know their shape."""
        return self.model

    def close(self) -> None:
        """Free DeepSpeed's threads, hooks and swap files."""
        super().close()
        self._alive = None


def _gather_by_block(model: PreTrainedModel) -> None:
    """Let ZeRO-3 gather the parameters of a block at once: half the hooks, on whose calls the host spends most of a step."""
    from deepspeed.utils import set_z3_leaf_modules
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = {type(module) for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
    if blocks:
        set_z3_leaf_modules(model, list(blocks))


def _announce_stage3(ds_config: dict[str, Any]) -> Any:
    """Tell transformers that parameters are to be partitioned as they are built; the returned object must stay alive."""
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(ds_config)
