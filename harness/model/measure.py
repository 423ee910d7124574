"""How long the parts of a model take on this device, for a cut into stages of equal time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from harness.model.build import enable_activation_checkpointing
from harness.model.families import family_of
from harness.model.partition import Costs

if TYPE_CHECKING:
    from transformers import PretrainedConfig

REPEATS = 5


def time_costs(
    config: PretrainedConfig, *, dtype: torch.dtype, device: torch.device, micro_batch: int, sequence_length: int, recompute_every: int = 0
) -> Costs:
    """Seconds of forward and backward of the embedding, of a block and of the head with its loss, for one micro-batch.

    One block is built, with meaningless weights: all blocks of these families are alike.

    Args:
        config: of the model.
        dtype: of its parameters.
        device: where it will be trained.
        micro_batch: rows of a forward pass.
        sequence_length: tokens of a row.
        recompute_every: every how many blocks one is recomputed; 0 for none.
    """
    from transformers import AutoModelForCausalLM

    small = type(config)(**{**config.to_dict(), "num_hidden_layers": 1, "layer_types": None})
    small.use_cache, small._attn_implementation = False, config._attn_implementation
    model = AutoModelForCausalLM.from_config(small, dtype=dtype).to(device)
    base = getattr(model, family_of(config).base)
    ids = torch.zeros((micro_batch, sequence_length), dtype=torch.int64, device=device)
    positions = torch.arange(sequence_length, device=device).expand_as(ids)
    hidden = torch.zeros((micro_batch, sequence_length, config.get_text_config().hidden_size), dtype=dtype, device=device, requires_grad=True)

    def head() -> Any:
        logits = model.get_output_embeddings()(hidden)
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())

    def block() -> Any:
        return base(inputs_embeds=hidden, position_ids=positions, use_cache=False).last_hidden_state.sum()

    model.train()
    kept = recomputed = _seconds(block, device)
    embedding = max(0.0, _seconds(lambda: base(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.sum(), device) - kept)
    last = _seconds(head, device)
    if recompute_every:
        enable_activation_checkpointing(model, 1)
        recomputed = _seconds(block, device)
    num_blocks = config.get_text_config().num_hidden_layers
    blocks = tuple(recomputed if recompute_every and number % recompute_every == 0 else kept for number in range(num_blocks))
    del model, base
    if device.type == "cuda":  # what was measured is not to be counted as training's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return Costs(embedding, blocks, last)


def _seconds(forward: Callable[[], torch.Tensor], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        forward().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
