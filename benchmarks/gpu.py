"""GPT-2 124M in bf16 at 1,024 tokens on one GPU: the harness beside a bare DeepSpeed loop, and what share of the peak both reach.

Both train the same packed rows with the same optimizer; the bare loop's attention is what transformers takes by itself.

usage: python benchmarks/gpu.py [--cells NAME:MICRO_BATCH ...] [--steps N] [--profile FILE]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LENGTH = 1024
WARM_UP = 5


def _settings(name: str, micro_batch: int) -> tuple[Any, Any, dict[str, Any]]:
    from transformers import GPT2Config

    from harness.config.batch import BatchEquation
    from harness.config.deepspeed import merge
    from harness.config.load import Loaded
    from harness.config.schema import RunFile

    run = RunFile.model_validate({
        "run_dir": "unused", "data": {"dir": "unused", "train": {"path": "unused"}, "sequence_length": LENGTH}, "model": {"architecture": {"model_type": "gpt2"}},
        "train": {"steps": 1, "global_batch_rows": micro_batch, "micro_batch": micro_batch, "precision": "bf16"}, "engine": {"deepspeed": name},
    })
    config = GPT2Config(use_cache=False, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    return run, config, merge(Loaded(run, {}), BatchEquation(micro_batch, micro_batch, 1, 1, LENGTH))


def _timed(step: Callable[[int], None], steps: int) -> dict[str, float]:
    import torch

    torch.cuda.reset_peak_memory_stats()
    for number in range(WARM_UP):
        step(number + 1)
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    started = time.perf_counter()
    for number, mark in enumerate(marks[:-1]):
        mark.record()
        step(WARM_UP + number + 1)
    marks[-1].record()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - started) / steps
    each = [a.elapsed_time(b) / 1000 for a, b in zip(marks, marks[1:], strict=False)]
    return {"median": statistics.median(each), "wall": wall, "memory": float(torch.cuda.max_memory_allocated())}


def harness_loop(name: str, micro_batch: int, steps: int, device: Any) -> dict[str, float]:
    """The harness's engine with its agreement a step."""
    from harness.engine.zero import ZeroEngine
    from harness.model.flops import flops_per_token
    from harness.resilience.agreement import Agreement
    from harness.testing.rows import cut, random_rows

    run, config, ds_config = _settings(name, micro_batch)
    engine = ZeroEngine(run, config, ds_config, device=device, weights=None)
    agreement = Agreement(device)
    batch = cut(random_rows(1, rows=micro_batch, length=LENGTH, vocabulary=config.vocab_size), micro_batch=micro_batch, rank=0, ranks=1)

    def step(number: int) -> None:
        result = engine.train_step(batch, step=number, lr=1e-4)
        agreement.collect()
        agreement.offer(result.loss_sum, result.aux_loss_sum, stop=False, save=False)

    answer = _timed(step, steps) | {"flops": flops_per_token(engine.whole_model(), LENGTH)}
    engine.close()
    return answer


def bare_loop(name: str, micro_batch: int, steps: int, device: Any) -> dict[str, float]:
    """The shortest DeepSpeed loop with the same configuration."""
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from harness.config.deepspeed import offload_device
    from harness.engine.optimizer import build_optimizer
    from harness.model.build import decay_groups
    from harness.model.flops import flops_per_token
    from harness.testing.rows import random_rows

    run, config, ds_config = _settings(name, micro_batch)
    alive = HfDeepSpeedConfig(ds_config) if "zero3" in name else None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    optimizer = build_optimizer(decay_groups(model, 0.01), run.optimizer, offloaded=offload_device(ds_config, "optimizer") != "none", use_gpu=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    ids, positions, labels = (torch.as_tensor(a).to(device) for a in random_rows(1, rows=micro_batch, length=LENGTH, vocabulary=config.vocab_size))

    def step(number: int) -> None:
        engine.backward(engine(input_ids=ids, position_ids=positions, labels=labels, use_cache=False).loss)
        engine.step()

    answer = _timed(step, steps) | {"flops": flops_per_token(model, LENGTH)}
    engine.destroy()
    del alive
    return answer


def main() -> int:
    """Print a table; 2 where there is no GPU."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from harness import distributed, world
    from harness.model.flops import peak_flops
    from harness.units import format_bytes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["zero1:32", "zero1:128", "zero3:32"], help="DeepSpeed configurations with their micro-batch")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--profile", type=Path, help="where to write the kernels of three steps of the harness in the first cell")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no GPU here.", file=sys.stderr)
        return 2
    device = distributed.init(world.World(), use_gpu=True, timeout_minutes=5)
    name = torch.cuda.get_device_name()
    peak = peak_flops(name, "bf16")
    table = Table("cell", "loop", "tokens/s", "MFU", "step (median)", "step (wall)", "peak memory",
                  title=f"{name}: GPT-2 124M, bf16, {LENGTH} tokens, packed", title_justify="left")
    for cell in arguments.cells:
        deepspeed_name, micro_batch = cell.split(":")[0], int(cell.split(":")[1])
        for label, loop in (("harness", harness_loop), ("bare DeepSpeed", bare_loop)):
            try:
                result = loop(deepspeed_name, micro_batch, arguments.steps, device)
            except torch.OutOfMemoryError:
                table.add_row(cell, label, "out of memory")
                continue
            finally:
                gc.collect()
                torch.cuda.empty_cache()
            speed = micro_batch * LENGTH / result["wall"]
            share = f"{speed * result['flops'] / peak:.1%}" if peak else "unknown device"
            table.add_row(cell, label, f"{speed:,.0f}", share, f"{result['median'] * 1000:.1f} ms", f"{result['wall'] * 1000:.1f} ms", format_bytes(result["memory"]))
    if arguments.profile:
        deepspeed_name, micro_batch = arguments.cells[0].split(":")
        with torch.profiler.profile() as profile:
            harness_loop(deepspeed_name, int(micro_batch), 3, device)
        arguments.profile.write_text(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90))
    Console(width=130).print(table)
    distributed.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
