"""What runs on the ranks of the engine's tests, and the plain PyTorch loop that it is compared with."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from harness.testing.models import VOCABULARY, tiny_config
from harness.testing.rows import cut, random_rows

ROWS, LENGTH, STEPS, LR, DECAY, CLIP = 8, 32, 20, 1e-3, 0.1, 0.5


def run_file(*, micro_batch: int = 1, checkpointing: int = 0, precision: str = "fp32", seed: int = 0, stages: int = 1, loss: str = "auto") -> Any:
    from harness.config.schema import RunFile

    return RunFile.model_validate({
        "run_dir": "unused", "data": {"dir": "unused", "train": {"path": "unused"}, "sequence_length": LENGTH},
        "model": {"architecture": {"model_type": "gpt2"}, "loss": loss},
        "train": {"steps": STEPS, "global_batch_rows": ROWS, "micro_batch": micro_batch, "precision": precision, "clip": CLIP, "seed": seed,
                  "activation_checkpointing": checkpointing},
        "optimizer": {"lr": LR, "weight_decay": DECAY}, "engine": {"pipeline_stages": stages},
    })


def ds_config(name: str, run: Any, *, ranks: int, nvme: str) -> dict[str, Any]:
    """The shipped configuration merged as `train` merges it."""
    from harness.config.batch import BatchEquation
    from harness.config.deepspeed import merge
    from harness.config.load import Loaded

    run = run.model_copy(update={"engine": run.engine.model_copy(update={"deepspeed": name})})
    micro = run.train.micro_batch
    return merge(Loaded(run, {}), BatchEquation(ROWS, micro, ROWS // micro // ranks, ranks, LENGTH), nvme_path=nvme)


def engine_of(
    name: str, kind: str = "gpt2", *, stage: int | None = None, precision: str = "fp32", accumulate_in: str | None = None, stages: int = 1, **zero: Any
) -> Any:
    """A tiny model of two rows a micro-batch under a shipped configuration, of which `stage` and keys of `zero_optimization` may be others."""
    from harness import distributed
    from harness.engine.open import open_engine

    run = run_file(micro_batch=2, precision=precision, stages=stages)
    if accumulate_in:
        run = run.model_copy(update={"train": run.train.model_copy(update={"accumulate_in": accumulate_in})})
    merged = ds_config(name, run, ranks=distributed.size() // stages, nvme="unused")
    merged["zero_optimization"] |= {**zero, **({} if stage is None else {"stage": stage})}
    return open_engine(run, tiny_config(kind), copy.deepcopy(merged), device=torch.device("cpu"), weights=None)


def batch_of(step: int, *, micro_batch: int = 2) -> Any:
    """This rank's part of a step's rows."""
    from harness import distributed

    rows = random_rows(step, rows=ROWS, length=LENGTH, vocabulary=VOCABULARY)
    return cut(rows, micro_batch=micro_batch, rank=distributed.rank(), ranks=distributed.size())


def train(name: str, kind: str, micro_batch: int, options: dict[str, Any]) -> dict[str, Any]:
    """Train STEPS steps on this rank; every rank returns losses, norms and weights."""
    from harness import distributed
    from harness.engine.open import open_engine
    from harness.world import Grid

    stages = options.get("stages", 1)
    named = {key: options[key] for key in ("checkpointing", "precision", "loss") if key in options}
    run = run_file(micro_batch=micro_batch, stages=stages, **named)
    config = tiny_config(kind, **{key: options[key] for key in ("dropout", "width", "vocabulary", "layers", "tied") if key in options})
    grid = Grid(stages, distributed.size(), distributed.rank())
    merged = ds_config(name, run, ranks=grid.dp_size, nvme=options.get("nvme", "unused"))
    engine = open_engine(run, config, copy.deepcopy(merged), device=torch.device("cpu"), weights=options.get("weights"))
    apply_fault(engine, options.get("fault"))
    losses, norms = [], []
    for step in range(1, options.get("steps", STEPS) + 1):
        batch = cut(random_rows(step, rows=ROWS, length=LENGTH, vocabulary=VOCABULARY), micro_batch=micro_batch, rank=grid.dp_rank, ranks=grid.dp_size)
        result = engine.train_step(batch, step=step, lr=LR)
        assert result.applied
        total = result.loss_sum.clone()
        distributed.all_reduce_sum(total)
        losses.append(total.item() / batch.trained_tokens)
        norms.append(result.grad_norm)
    answer = {"losses": losses, "norms": norms, "weights": masters(engine)}
    engine.close()
    distributed.barrier()
    return answer


def masters(engine: Any) -> dict[str, np.ndarray]:
    """The fp32 master weights, put together from the slices of all ranks."""
    from harness import distributed

    mine = [(part.name, part.offset, group.tensors["master"][part.name].clone().numpy()) for group in engine.named_slices() for part in group.slices]
    whole = {name: np.zeros(int(np.prod(entry["shape"])), np.float32) for name, entry in engine.parameters().items()}
    for owned in distributed.gather_objects(mine):
        for name, offset, values in owned:
            whole[name][offset : offset + len(values)] = values
    return {name: values.reshape(engine.parameters()[name]["shape"]) for name, values in whole.items()}


def own_tokens(labels: Any) -> int:
    """What a micro-batch would divide by if it took its own mean."""
    return max(1, int((labels != -100).sum())) * (ROWS // len(labels))


def apply_fault(engine: Any, fault: str | None) -> None:
    """Plant what the comparison must notice."""
    groups = engine.param_groups
    if fault == "decay on norms":
        for group in groups:
            group["weight_decay"] = DECAY
    elif fault == "no decay":
        for group in groups:
            group["weight_decay"] = 0.0
    elif fault == "mean of means":
        if engine.name == "pipeline":
            loss = engine.layer.loss
            engine.layer.loss = lambda output, labels, *, tokens: loss(output, labels, tokens=own_tokens(labels))
        else:
            forward = engine._forward
            engine._forward = lambda micro, *, tokens: forward(micro, tokens=own_tokens(micro.labels))
    elif fault == "16-bit weights":
        step = engine.train_step

        def rounded(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                for parameter in engine.deepspeed.module.parameters():
                    held = getattr(parameter, "ds_tensor", parameter)
                    held.data.copy_(held.data.bfloat16().float())
            return step(*args, **kwargs)

        engine.train_step = rounded


def plain(kind: str, **options: Any) -> dict[str, Any]:
    """One process, plain PyTorch and transformers: the reference."""
    from harness.model.build import build, decay_groups

    model = build(tiny_config(kind, **options), path=None, precision="fp32", seed=0, zero3=False).train()
    optimizer = torch.optim.AdamW(decay_groups(model, DECAY), lr=LR)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        ids, positions, labels = (torch.as_tensor(a) for a in random_rows(step, rows=ROWS, length=LENGTH, vocabulary=VOCABULARY))
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "weights": {name: p.detach().numpy() for name, p in model.named_parameters()}}
