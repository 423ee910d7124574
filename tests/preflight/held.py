"""What a real engine holds on this rank at the fullest moments of a step, by where DeepSpeed keeps it on a GPU machine."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from harness.testing.models import VOCABULARY, tiny_config
from harness.testing.rows import cut, random_rows
from tests.engine import work

MODEL = {"layers": 4, "width": 512}
"""So large that activations are little beside it."""
ON_THE_HOST = ("single_partition_of_fp32_groups", "param_buffer_of_bit16_for_cpu_offload_groups", "accumulated_grads_in_cpu",
               "temp_grad_buffer_for_cpu_offload", "fp32_partitioned_groups_flat", "grad_partitions_flat_buffer", "param_groups_fp16_flat_cpu_memory")
"""Of DeepSpeed's ZeRO optimizers under offload."""


def held(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train two steps and answer with the parameters of this rank's model, and with the most bytes on device, host and NVMe.

    Args:
        name: of a shipped configuration.
        options: precision, accumulate_in, stages, nvme; zero: more of its `zero_optimization`; model: of `tiny_config`.
    """
    from harness import distributed
    from harness.engine.open import open_engine
    from harness.world import Grid

    run = work.run_file(precision=options.get("precision", "bf16"), stages=options.get("stages", 1))
    run = run.model_copy(update={"train": run.train.model_copy(update={"accumulate_in": options.get("accumulate_in", "fp32")})})
    grid = Grid(options.get("stages", 1), distributed.size(), distributed.rank())
    merged = work.ds_config(name, run, ranks=grid.dp_size, nvme=options.get("nvme", "unused"))
    merged["zero_optimization"] |= {
        "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0, **options.get("zero", {}),
    }
    gc.collect()
    gc.freeze()  # what is there already is not looked at
    engine = open_engine(run, tiny_config("gpt2", **options.get("model", MODEL)), copy.deepcopy(merged), device=torch.device("cpu"), weights=None)
    zero, most = engine.deepspeed.optimizer, {"device": 0, "host": 0}

    def look(*_: Any) -> None:
        gc.collect()
        there = _sizes(_of_host(zero, ds_config=merged))
        most["host"] = max(most["host"], sum(there.values()))
        most["device"] = max(most["device"], sum(size for place, size in _sizes(_tensors()).items() if place not in there))

    for step in (1, 2):
        rows = random_rows(step, rows=work.ROWS, length=work.LENGTH, vocabulary=VOCABULARY)
        batch = cut(rows, micro_batch=1, rank=grid.dp_rank, ranks=grid.dp_size)
        engine.train_step(batch, step=step, lr=1e-3)
        if step == 1:  # the moments are there only now
            _before(zero, "step", look)
            if hasattr(zero, "optimizer"):
                _before(zero.optimizer, "step", look)
            if grid.stages == 1:  # where no micro-batch is in flight before a forward
                engine.deepspeed.module.register_forward_pre_hook(look)
            if engine.stage == 1:  # after backward, where ZeRO-2 makes them in its midst
                _after(zero, "_build_compact_grad_partition_buffer", look)
            else:
                _before(zero, "independent_gradient_partition_epilogue", look)
    nvme = sum(path.stat().st_size for path in Path(options["nvme"]).rglob("*") if path.is_file()) if "nvme" in options else 0
    parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.deepspeed.module.parameters())
    engine.close()
    gc.unfreeze()
    distributed.barrier()
    return {"parameters": parameters, "config": merged, "nvme": nvme, **most}


def _before(owner: Any, method: str, look: Any) -> None:
    if plain := getattr(owner, method, None):
        setattr(owner, method, lambda *args, **kwargs: (look(), plain(*args, **kwargs))[1])


def _after(owner: Any, method: str, look: Any) -> None:
    if plain := getattr(owner, method, None):
        setattr(owner, method, lambda *args: (plain(*args), look())[0])


def _tensors() -> Iterator[torch.Tensor]:
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            yield from (thing, getattr(thing, "grad_accum", None), getattr(thing, "ds_tensor", None), thing.grad if thing.is_leaf else None)


def _of_host(zero: Any, *, ds_config: dict[str, Any]) -> Iterator[torch.Tensor]:
    from harness.config.deepspeed import offload_device

    if offload_device(ds_config, "optimizer") == "none":
        return
    for moments in zero.optimizer.state.values():
        yield from moments.values()
    for name in ON_THE_HOST:
        for tensor in _flat(getattr(zero, name, None)):
            yield from (tensor, tensor.grad if tensor.is_leaf else None)


def _flat(thing: Any) -> Iterator[torch.Tensor]:
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, list | tuple | dict):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from _flat(part)


def _sizes(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes by address of what is behind the tensors."""
    stores = (tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu")
    return {store.data_ptr(): store.nbytes() for store in stores}
