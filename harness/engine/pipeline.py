"""The pipeline engine: a Hugging Face causal language model cut into stages, under ZeRO-0 or 1, with CPU offload of the optimizer."""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

from harness import distributed
from harness.config.deepspeed import offload_device, zero
from harness.config.schema import RunFile
from harness.engine.clock import WORK, Clock
from harness.engine.common import CommonEngine, initialize
from harness.engine.instructions import take_over
from harness.engine.optimizer import build_optimizer
from harness.engine.steps import StepResult, evaluation_sums, seed_micro_batch
from harness.errors import Refused
from harness.heartbeat import mark
from harness.model.attention import use_attention
from harness.model.build import DTYPES, decay_groups, enable_activation_checkpointing
from harness.model.head import use_chunked_loss
from harness.model.measure import time_costs
from harness.model.partition import UNEVEN, skeleton, stage_bounds
from harness.model.stage import Stage, build_stage
from harness.world import Grid

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from harness.data.loader import Batch, GlobalBatch

EVALUATED_TOGETHER = 64
"""Micro-batches that an evaluation sends through the pipeline in one go."""


class StageModule(PipelineModule):
    """DeepSpeed's view of the pipeline: one layer a stage, of which this rank holds its own.

    Args:
        stage: this rank's.
        grid: where this rank stands.
        loss: (output, labels) -> what the last stage differentiates.
    """

    def __init__(self, stage: Stage, grid: Grid, loss: Any):
        self._grid_of_ranks = grid
        layers: list[Any] = [None] * grid.stages
        layers[grid.pp_stage] = stage
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints the layers of every stage
            super().__init__(
                layers, topology=PipeDataParallelTopology(num_pp=grid.stages, num_dp=grid.dp_size), loss_fn=loss, partition_method="uniform"
            )

    @property
    def stage(self) -> Stage:
        """This rank's layer."""
        return self.forward_funcs[0]

    def _index_tied_modules(self) -> dict[str, Any]:
        """The groups in which the copies of a tied embedding on the outer stages meet; the first stage's is the one that counts."""
        grid, weight = self._grid_of_ranks, self.stage.shared_embedding
        if not getattr(self.stage.model.config, "tie_word_embeddings", False) or grid.stages == 1:
            return {}
        comms = {}
        for dp_rank in range(grid.dp_size):
            ranks = [dp_rank, (grid.stages - 1) * grid.dp_size + dp_rank]
            group = distributed.new_group(ranks)
            if grid.rank in ranks:
                assert weight is not None
                weight.ds_pipe_replicated = grid.is_last
                holder = torch.nn.ParameterList([weight])
                comms["embedding"] = {"ranks": ranks, "group": group, "weight_attr": ["0"], "module": holder}
        return comms

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        super()._synchronize_tied_weights()

    def get_tied_weights_and_groups(self) -> list[tuple[torch.nn.Parameter, Any]]:
        """The shared weight and its group, on the stages that hold it."""
        return [(self.stage.shared_embedding, comm["group"]) for comm in self.tied_comms.values()]


class PipelineEngine(CommonEngine):
    """One step interface over DeepSpeed's pipeline.

    Args:
        run: the run file.
        config: configuration of the model.
        ds_config: the merged DeepSpeed configuration.
        device: where this rank computes.
        weights: folder or hub name to load from, or None for fresh weights.
        fresh: False where a checkpoint follows, so that no weights need be made.
    """

    name = "pipeline"

    def __init__(
        self, run: RunFile, config: PretrainedConfig, ds_config: dict[str, Any], *, device: torch.device, weights: str | None, fresh: bool = True
    ):
        self.run, self.config, self.device = run, config, device
        self.stage = int(zero(ds_config).get("stage", 0))
        self.grid = Grid(run.engine.pipeline_stages, distributed.size(), distributed.rank())
        use_attention(
            config, run.model.attention, device_type=device.type, precision=run.train.precision, sequence_length=run.data.sequence_length
        )
        self.bounds = _agreed_bounds(run, config, device)
        stage = build_stage(config, self.bounds, self.grid.pp_stage, weights=weights, precision=run.train.precision, seed=run.train.seed, fresh=fresh)
        enable_activation_checkpointing(stage.model, run.train.activation_checkpointing, first_block=stage.bounds[0])
        if stage.is_last:
            use_chunked_loss(stage.model, run.model.loss, on_gpu=device.type == "cuda")
        groups = decay_groups(stage, run.optimizer.weight_decay)
        _refuse_frozen_stages(self.bounds, distributed.gather_objects((self.grid.pp_stage, bool(groups))))
        optimizer = build_optimizer(groups, run.optimizer, offloaded=offload_device(ds_config, "optimizer") != "none", use_gpu=device.type == "cuda")
        self._tokens, self._sums = 1, torch.zeros(3, dtype=torch.float64, device=device)
        self._seeds: list[tuple[int, int]] = []
        module = StageModule(stage, self.grid, self._loss)
        self.deepspeed = initialize(module, optimizer, ds_config, fp32=run.train.precision == "fp32")
        self.clock, self._whole = Clock(device), skeleton(config, DTYPES[run.train.precision])
        self._worked: list[float] = []
        take_over(self.deepspeed, self.clock, self._before_forward)

    @property
    def layer(self) -> Stage:
        """This rank's stage."""
        return self.deepspeed.module.stage

    def train_step(self, batch: GlobalBatch, *, step: int, lr: float) -> StepResult:
        """Forward, backward and update for one global batch.

        The gradient is that of the mean over the trained tokens of the whole global batch, however it is cut.

        Args:
            batch: this rank's micro-batches and the trained tokens of all ranks.
            step: number of this optimizer step, from 1.
            lr: learning rate of this step.
        """
        self.set_lr(lr)
        self._tokens = max(batch.trained_tokens, 1)
        self._sums.zero_()
        self._seeds = [(step, micro.first_row) for micro in reversed(batch.micro_batches)]
        mark("forward", step)
        self.clock.start()
        self.deepspeed.train_batch(iter([self._item(micro) for micro in batch.micro_batches]))
        seconds = self.clock.seconds()
        busy = sum(seconds.get(name, 0.0) for name in WORK)
        self._worked.append(busy)
        return StepResult(
            self._sums[0].clone(), torch.zeros_like(self._sums[0]), batch.trained_tokens, self.grad_norm(), self.deepspeed.was_step_applied(),
            seconds=lambda: seconds, busy_s=busy, window_s=self.clock.window_s() if self.grid.is_first else 0.0,
        )

    def _before_forward(self) -> None:
        if self._seeds:
            step, first_row = self._seeds.pop()
            seed_micro_batch(self.run.train.seed, step=step, first_row=first_row, stage=self.grid.pp_stage)

    def _loss(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What the last stage differentiates; DeepSpeed divides it by the accumulation and averages over the copies."""
        if not self.deepspeed.module.training:
            loss = self.layer.loss(output, labels, tokens=1)
            judged = self.layer.head is not None
            self._sums += evaluation_sums(loss, self.layer.judged if judged else output, labels, judged=judged)
            return loss
        loss = self.layer.loss(output, labels, tokens=self._tokens)
        self._sums[0] += loss.detach().double() * self._tokens
        return loss * (self.grid.dp_size * self.deepspeed.micro_batches)

    def _item(self, batch: Batch) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        inputs = self.widen(batch)
        return (inputs["input_ids"], inputs["position_ids"]), inputs["labels"]

    def eval_sums(self, batches: Iterable[Batch]) -> torch.Tensor:
        """Sums over the trained tokens of this pipeline's micro-batches; every rank must have equally many.

        Returns:
            float64 tensor [3] on the device: sum of token losses, trained tokens, tokens whose argmax is right; zero on
            all stages but the last.
        """
        self._sums.zero_()
        self.deepspeed.reset_activation_shape()
        remaining = iter(batches)
        mark("evaluate")
        while portion := list(islice(remaining, EVALUATED_TOGETHER)):
            mark("evaluate")
            items = iter([self._item(batch) for batch in portion])
            self.deepspeed.eval_batch(items, reduce_output=None, bcast_loss=False, num_micro_batches=len(portion))
        self.deepspeed.reset_activation_shape()
        self.deepspeed.pipe_buffers["outputs"] = [None] * self.deepspeed.num_pipe_buffers  # the last logits are not kept through training
        return self._sums.clone()

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], *, stop_ids: list[int], max_new_tokens: int) -> list[list[int]]:
        """Answer each prompt greedily, on all ranks together; each token is one way through the stages.

        Args:
            prompts: token ids.
            stop_ids: tokens that end an answer.
            max_new_tokens: bound of each answer.

        Returns:
            the new tokens of each prompt.
        """
        self.deepspeed.module.eval()
        answers = []
        for prompt in prompts:
            ids = list(prompt)
            while len(ids) < len(prompt) + max_new_tokens and not set(ids[len(prompt):][-1:]) & set(stop_ids):
                ids.append(self._next_token(ids))
            answers.append(ids[len(prompt):])
        return answers

    def _next_token(self, ids: list[int]) -> int:
        mark("generate")
        grid, shape = self.grid, (1, len(ids), self.config.get_text_config().hidden_size)
        positions = torch.arange(len(ids), device=self.device)[None]
        if grid.is_first:
            carried = torch.tensor([ids], device=self.device)
        else:
            carried = torch.empty(shape, dtype=DTYPES[self.run.train.precision], device=self.device)
            distributed.receive(carried, grid.rank_of(grid.pp_stage - 1))
        output = self.layer((carried, positions))
        token = torch.zeros((), dtype=torch.int64, device=self.device)
        if grid.is_last:
            token = self.layer.logits(output[:, -1:])[0, -1].argmax()
        else:
            distributed.send(output[0], grid.rank_of(grid.pp_stage + 1))
        group = self.deepspeed.grid.get_pipe_parallel_group()
        return int(distributed.broadcast(token, grid.rank_of(grid.stages - 1), group=group))

    def balance(self) -> str:
        """Name the stage that works longest since the last call, when it works much longer than the mean. Collective."""
        mine = statistics.median(self._worked) if self._worked else 0.0
        self._worked = []
        work = [0.0] * self.grid.stages
        for stage, seconds in distributed.gather_objects((self.grid.pp_stage, mine)):
            work[stage] += seconds / self.grid.dp_size
        mean, slowest = sum(work) / len(work), max(range(len(work)), key=work.__getitem__)
        if mean == 0.0 or work[slowest] <= UNEVEN * mean:
            return ""
        first, stop = self.bounds[slowest], self.bounds[slowest + 1]
        remedy = "" if self.run.engine.partition == "time" else "; engine.partition=time cuts by measured time"
        return (
            f"Pipeline stage {slowest} (blocks {first} to {stop - 1}) works {work[slowest]:.3f} s a step, {work[slowest] / mean:.1f} times the mean "
            f"of all stages, and holds the others up{remedy}."
        )

    def parameter_names(self) -> dict[int, str]:
        """Identity of each parameter of this stage -> its Hugging Face name, tied ones once."""
        return self.layer.parameter_names()

    def whole_model(self) -> PreTrainedModel:
        """The whole model on torch's meta device."""
        return self._whole

    def close(self) -> None:
        """Free what DeepSpeed holds."""
        super().close()
        _forget_groups()


def _forget_groups() -> None:
    """DeepSpeed keeps the pipeline's groups for every later engine of the process, which fails without them."""
    from deepspeed.utils import groups

    groups.mpu = None


def _refuse_frozen_stages(bounds: tuple[int, ...], trained: list[tuple[int, bool]]) -> None:
    """DeepSpeed ends with a traceback when a stage has nothing to train, and its peers with a closed connection."""
    frozen = sorted({stage for stage, any_trained in trained if not any_trained})
    if frozen:
        raise Refused(
            f"Pipeline stage {frozen[0]} (blocks {bounds[frozen[0]]} to {bounds[frozen[0] + 1] - 1}) has no parameter that is trained.",
            where="engine.pipeline_stages", remedy="Use fewer stages, or train a parameter of each.",
        )


def _agreed_bounds(run: RunFile, config: PretrainedConfig, device: torch.device) -> tuple[int, ...]:
    """The cut into stages, the same on all ranks; rank 0 measures where it goes by time."""
    length, recompute_every, measured = run.data.sequence_length, run.train.activation_checkpointing, None
    if run.engine.partition == "time":
        if distributed.rank() == 0:
            dtype = DTYPES[run.train.precision]
            measured = time_costs(
                config, dtype=dtype, device=device, micro_batch=run.train.micro_batch, sequence_length=length, recompute_every=recompute_every
            )
        measured = distributed.broadcast_object(measured)
    return stage_bounds(
        config, stages=run.engine.pipeline_stages, method=run.engine.partition, sequence_length=length, recompute_every=recompute_every,
        measured=measured,
    )
