"""The one table of metrics: tag, unit and meaning, for those who write and those who read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One scalar of a run.

    Attributes:
        unit: what one of it is.
        meaning: what it says, in a sentence.
    """

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "train/loss": Metric("nats", "Mean loss over the trained tokens of the global batch."),
    "train/aux_loss": Metric("1", "Mean auxiliary (routing) loss over the micro-batches."),
    "train/tokens": Metric("tokens", "Trained tokens of the global batch."),
    "train/epoch": Metric("epochs", "Rows consumed as a share of the training rows."),
    "eval/loss": Metric("nats", "Mean loss over the trained tokens of the whole validation set."),
    "eval/perplexity": Metric("1", "exp(eval/loss)."),
    "eval/token_accuracy": Metric("share", "Trained tokens of the validation set whose most likely prediction is right."),
    "optim/lr": Metric("1", "Learning rate of the step."),
    "optim/grad_norm": Metric("1", "Global gradient norm before clipping."),
    "optim/skipped": Metric("steps", "1 when the update was skipped because a gradient was not finite."),
    "speed/step_seconds": Metric("s", "Wall-clock of the step, data included, evaluation and saving left out."),
    "speed/tokens_per_second": Metric("tokens/s", "Positions of the global batch, padding included, by step_seconds."),
    "speed/forward_seconds": Metric("s", "Time in the step's forwards; on a GPU that of its stream."),
    "speed/backward_seconds": Metric("s", "Time in the step's backwards, with the reductions that run beside them."),
    "speed/update_seconds": Metric("s", "Time in the optimizer: what is left to reduce, clipping, the update, offload."),
    "speed/flops_per_rank": Metric("FLOP/s", "What the model needs for a token (6 N + 12 L d T), by tokens_per_second and ranks."),
    "speed/mfu": Metric("share", "Model FLOPs utilisation: flops_per_rank by the dense peak of the GPU in the run's precision."),
    "speed/data_wait_seconds": Metric("s", "Time in which the step waited for its batch."),
    "speed/pipeline_idle_share": Metric("share", "Part of the step's forwards and backwards in which the mean stage waited for others."),
    "memory/host_bytes": Metric("bytes", "Resident memory of rank 0's process."),
    "memory/device_peak_bytes": Metric("bytes", "Highest memory that torch allocated on rank 0's GPU."),
    "checkpoint/stall_seconds": Metric("s", "Time in which training stood still for the checkpoint of the step."),
    "checkpoint/save_seconds": Metric("s", "What the checkpoint took in all: stall_seconds, and writing while training went on."),
}

CHARTS = {
    "loss": {"training and evaluation": ["Multiline", ["train/loss", "eval/loss", "eval/.+/loss"]]},
    "where a step's time goes": {
        "seconds": ["Multiline", ["speed/(step|forward|backward|update|data_wait)_seconds"]],
        "standing still for checkpoints": ["Multiline", ["checkpoint/.+"]],
    },
    "use of the hardware": {
        "tokens/s": ["Multiline", ["speed/tokens_per_second"]],
        "shares": ["Multiline", ["speed/mfu", "speed/pipeline_idle_share"]],
        "memory": ["Multiline", ["memory/.+"]],
    },
}
"""TensorBoard's tab of custom scalars: charts by category, each with patterns of the tags that it shows together."""


def check(tag: str) -> str:
    """`tag` itself, when the table has it; of an evaluation also `eval/SET/...` for one set of a mixture.

    Raises:
        KeyError: for a tag that nobody declared.
    """
    head, *middle, tail = tag.split("/")
    known = f"{head}/{tail}" if head == "eval" and len(middle) == 1 else tag
    if known not in METRICS:
        raise KeyError(f"{tag} is not in the table of metrics")
    return tag
