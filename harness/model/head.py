"""The loss of a model's head, some tokens at a time: the logits of a whole micro-batch are never in memory.

A vocabulary of 50,257 makes 6.6 GB of float32 logits of 32,768 tokens, and as much again of their gradients. Here a chunk's logits become its
loss and its gradients at once, in the forward pass, and are forgotten. The idea is that of "Cut Your Losses in Large-Vocabulary Language
Models" (Wijmans et al., 2024) and of Liger Kernel (Hsu et al., 2024); what runs is plain PyTorch, which torch's compiler fuses on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from harness.errors import Refused, first_line
from harness.log import say

PLAIN_HEADS = frozenset({
    "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "olmo", "olmo2", "olmoe", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
})
"""Model types that give the logits of their head to the loss as they are: no bias, scale or cap comes in between."""

CHUNK_ELEMENTS = 2**28
"""Logits in memory at a time: half a gigabyte in bf16."""
ALIGNED = 64
"""Matrix units want sizes that are multiples of it; GPT-2's vocabulary is odd, and its products take several times as long as they need."""
WORTH_COMPILING = 256
"""Tokens; the trial of a model before training has fewer, and its shape would make the kernels of training less special."""
UNTRAINED = -100


class ChunkedHead(torch.nn.Linear):
    """An output head that answers with the loss while labels are set, and with logits otherwise.

    Attributes:
        labels: int64 [rows, length] of the forward pass under way, or None.
    """

    labels: torch.Tensor | None

    @contextmanager
    def judging(self, labels: torch.Tensor) -> Iterator[None]:
        """Answer with the loss against these labels, each of which belongs to the token before."""
        self.labels = labels
        try:
            yield
        finally:
            self.labels = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [rows, length, vocabulary]; or, while labels are set, float32 [2]: sum of the token losses, tokens whose argmax is right.

        Tokens are counted as right only where no gradient is asked for; elsewhere that is 0.
        """
        if self.labels is None:
            return super().forward(hidden)
        targets = functional.pad(self.labels[:, 1:], (0, 1), value=UNTRAINED).flatten()
        learns = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        return _ChunkedLoss.apply(hidden.flatten(0, 1), self.weight, targets, learns)


def use_chunked_loss(model: Any, setting: str, *, on_gpu: bool, where: str = "model.loss") -> ChunkedHead | None:
    """Make a model compute its loss chunk by chunk; None where it stays as it is.

    Args:
        model: of transformers.
        setting: `model.loss`: auto takes chunks on a GPU where the model's head allows it; chunked insists, plain never does.
        on_gpu: where the model trains.
        where: the key and its origin.

    Raises:
        Refused: for `chunked`, where the model does something with its logits before the loss.
    """
    head = model.get_output_embeddings()
    fits = model.config.model_type in PLAIN_HEADS and type(head) is torch.nn.Linear and head.bias is None
    if setting == "chunked" and not fits:
        raise Refused(
            f"The loss of a model of type {model.config.model_type!r} cannot be computed in chunks.", where=where, remedy="Set model.loss=auto.",
        )
    if not fits or setting == "plain" or not (on_gpu or setting == "chunked"):
        return None
    head.__class__, head.labels = ChunkedHead, None
    plain = model.loss_function

    def loss(logits: torch.Tensor, labels: torch.Tensor, *more: Any, num_items_in_batch: Any = None, **options: Any) -> torch.Tensor:
        if head.labels is None:
            return plain(logits, labels, *more, num_items_in_batch=num_items_in_batch, **options)
        return logits[0] / num_items_in_batch

    model.loss_function = loss
    return head


class _ChunkedLoss(torch.autograd.Function):
    """hidden [tokens, width], weight [vocabulary, width], targets [tokens] -> float32 [2]: sum of losses, tokens that are right."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, learns: bool) -> torch.Tensor:
        size = len(weight)
        padded = -(-size // ALIGNED) * ALIGNED
        weight = functional.pad(weight, (0, 0, 0, padded - size)) if padded != size else weight
        judge = _compiled() if hidden.is_cuda and len(hidden) >= WORTH_COMPILING else _judge
        sums = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        if learns:
            to_hidden, to_weight = torch.empty_like(hidden), torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for first in range(0, len(hidden), rows := _rows(padded)):
            part, chunk = slice(first, first + rows), hidden[first : first + rows]
            losses, right, slope = judge(chunk @ weight.T, targets[part], size, learns)
            sums += torch.stack([losses.sum(dtype=torch.float64), right.sum(dtype=torch.float64)])
            if learns:
                torch.mm(slope, weight, out=to_hidden[part])
                _add_product(to_weight, slope, chunk)
        if learns:
            ctx.save_for_backward(to_hidden, to_weight[:size])
        return sums.float()

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        to_hidden, to_weight = ctx.saved_tensors
        return (to_hidden * slope[0]).to(to_hidden.dtype), (to_weight * slope[0]).to(to_hidden.dtype), None, None


def _rows(padded: int) -> int:
    """Tokens of a chunk: a power of two, so that most micro-batches make chunks of one size."""
    return max(1 << (CHUNK_ELEMENTS // padded).bit_length() - 1, 1)


def _add_product(total: torch.Tensor, slope: torch.Tensor, chunk: torch.Tensor) -> None:
    """total += slope.T @ chunk; slopes are within 1, but their sum over many tokens may leave fp16's range, so a power of two makes it fit."""
    if chunk.dtype != torch.float16:
        total += slope.T @ chunk
        return
    largest = chunk.abs().amax().float() * len(chunk)
    room = torch.exp2(torch.floor(torch.log2(torch.finfo(torch.float16).max / largest))).clamp(max=1.0)
    total.addcmul_(slope.T @ (chunk * room), 1 / room)


def _judge(logits: torch.Tensor, targets: torch.Tensor, size: int, learns: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses and hits of a chunk, float32 and bool [tokens], and the gradient of the sum of losses by the logits, as the logits.

    Args:
        logits: [tokens, padded vocabulary].
        targets: [tokens].
        size: of the vocabulary; the columns after it are padding.
        learns: whether a gradient is asked for; else hits are.
    """
    columns = torch.arange(logits.shape[1], device=logits.device)
    wide = torch.where(columns < size, logits.float(), -torch.inf)
    trained = targets != UNTRAINED
    norm = torch.logsumexp(wide, 1)
    losses = torch.where(trained, norm - logits.gather(1, targets.clamp(min=0)[:, None])[:, 0].float(), 0.0)
    if not learns:
        return losses, (wide.argmax(1) == targets) & trained, logits
    slope = torch.exp(wide - norm[:, None]) - (columns == targets[:, None]).float()
    return losses, torch.zeros_like(trained), torch.where(trained[:, None], slope, 0.0).to(logits.dtype)


@cache
def _compiled() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """`_judge` in few passes over the logits; as it is where this machine cannot compile it."""
    compiled = torch.compile(_judge)
    works: list[bool] = []

    def judge(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if works == [False]:
            return _judge(*arguments)
        try:
            answer = compiled(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if works:
                raise
            works.append(False)
            say(f"The loss is computed uncompiled, which takes longer: {first_line(error)}")
            return _judge(*arguments)
        works[:] = [True]
        return answer

    return judge
