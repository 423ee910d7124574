"""A loss in chunks is the loss of transformers, and so are its gradients, without the logits of a whole micro-batch."""

from __future__ import annotations

import copy

import pytest
import torch

from harness.engine.steps import evaluation_sums
from harness.errors import Refused
from harness.model import head
from harness.model.build import build
from harness.model.head import PLAIN_HEADS, ChunkedHead, use_chunked_loss
from harness.testing.models import tiny_config
from harness.testing.rows import random_rows

VOCABULARY, LENGTH, ROWS = 321, 40, 3


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Seven tokens' logits and more are two chunks; the last one is not full."""
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 384 * 32)


def pair(kind: str, precision: str = "fp32", **more):
    """The same model twice, the second with its loss in chunks."""
    config = tiny_config(kind, vocabulary=VOCABULARY, **more)
    plain = build(config, path=None, precision=precision, seed=3, zero3=False)
    chunked = copy.deepcopy(plain)
    assert isinstance(use_chunked_loss(chunked, "chunked", on_gpu=False), ChunkedHead)
    return plain.train(), chunked.train()


def rows(seed: int = 1) -> dict[str, torch.Tensor]:
    names = ("input_ids", "position_ids", "labels")
    found = dict(zip(names, map(torch.as_tensor, random_rows(seed, rows=ROWS, length=LENGTH, vocabulary=VOCABULARY)), strict=True))
    found["labels"][1, :20] = -100
    return found


def gradients(model, inputs, *, tokens: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and all gradients in one."""
    output = model.get_output_embeddings()
    if isinstance(output, ChunkedHead):
        with output.judging(inputs["labels"]):
            loss = model(**inputs, use_cache=False, num_items_in_batch=tokens).loss
    else:
        loss = model(**inputs, use_cache=False, num_items_in_batch=tokens).loss
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.flatten().double() for parameter in model.parameters() if parameter.grad is not None])


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("kind", sorted(PLAIN_HEADS))
def test_loss_and_gradients_are_those_of_transformers(kind):
    plain, chunked = pair(kind, width=64, pad_token_id=0)
    inputs = rows()
    (expected, slopes), (loss, ours) = gradients(plain, inputs), gradients(chunked, inputs)
    assert head._rows(384) == 32 < ROWS * LENGTH and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert len(ours) == len(slopes) and error(ours, slopes) <= 2e-6


def test_in_bf16_it_is_as_exact_as_transformers():
    exact, _ = pair("llama", width=64)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.bfloat16())
    plain, chunked = pair("llama", "bf16", width=64)
    for model in (plain, chunked):
        model.load_state_dict(exact.state_dict())
    inputs = rows(2)
    true, theirs, ours = (gradients(model, inputs)[1] for model in (exact, plain, chunked))
    assert 0 < error(ours, true) <= 1.1 * error(theirs, true)


def test_in_fp16_the_sum_over_many_tokens_does_not_overflow():
    """A direction in which all hidden states are large, and a word that many tokens become: their sum is no number of fp16, their mean is."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 4096, 16, generator=generator) * 0.5, torch.randn(100, 16, generator=generator) * 0.02
    hidden[..., 5], labels = 60.0, torch.randint(0, 100, (1, 4096), generator=generator)
    labels[:, :1400] = 7
    slopes = []
    for precision, chunked in ((torch.float32, False), (torch.float16, True)):
        states, part = hidden.to(precision), torch.nn.Linear(16, 100, bias=False, dtype=precision)
        part.weight.data.copy_(weight)
        if chunked:
            part.__class__, part.labels = ChunkedHead, labels
            loss = part(states)[0]
        else:
            loss = torch.nn.functional.cross_entropy(part(states)[0, :-1], labels[0, 1:], reduction="sum")
        (loss / 4096 * 16).backward()
        slopes.append(part.weight.grad.double())
    assert slopes[0].abs().max() > 100 and error(slopes[1], slopes[0]) <= 1e-3


def test_an_evaluation_counts_what_is_right():
    plain, chunked = pair("gpt2", width=64)
    inputs = rows()
    with torch.no_grad():
        logits = plain(**inputs, use_cache=False).logits
        inputs["labels"][2, 5:30] = logits[2, 4:29].argmax(-1)  # else a fresh model is right nowhere
        expected = evaluation_sums(plain(**inputs, use_cache=False, num_items_in_batch=1).loss, logits, inputs["labels"])
        with chunked.get_output_embeddings().judging(inputs["labels"]):
            output = chunked(**inputs, use_cache=False, num_items_in_batch=1)
        found = evaluation_sums(output.loss, output.logits, inputs["labels"], judged=True)
    assert expected[2] >= 25 and found[1:].tolist() == expected[1:].tolist() and found[0].item() == pytest.approx(expected[0].item(), rel=1e-6)


def test_without_labels_it_gives_logits():
    plain, chunked = pair("gpt2", width=64)
    inputs = rows()
    del inputs["labels"]
    assert torch.equal(chunked(**inputs, use_cache=False).logits, plain(**inputs, use_cache=False).logits)


def test_memory_holds_the_logits_of_a_chunk_alone():
    """What is saved for the backward pass: nothing with a row for each token and a column for each word."""
    _, chunked = pair("gpt2", width=64)
    inputs, seen = rows(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor.numel()) or tensor, lambda tensor: tensor):
        with chunked.get_output_embeddings().judging(inputs["labels"]):
            chunked(**inputs, use_cache=False, num_items_in_batch=5)
    assert seen and max(seen) < ROWS * LENGTH * VOCABULARY


@pytest.mark.parametrize("kind", ["granite", "phi", "cohere"])
def test_a_head_that_does_more_is_left_alone(kind):
    model = build(tiny_config(kind, vocabulary=VOCABULARY), path=None, precision="fp32", seed=0, zero3=False)
    assert use_chunked_loss(model, "auto", on_gpu=True) is None
    with pytest.raises(Refused, match=f"(?s){kind}.*model.loss=auto"):
        use_chunked_loss(model, "chunked", on_gpu=True)


@pytest.mark.parametrize("setting, on_gpu, chunks", [("auto", True, True), ("auto", False, False), ("plain", True, False), ("chunked", False, True)])
def test_who_gets_it(setting, on_gpu, chunks):
    model = build(tiny_config("llama"), path=None, precision="fp32", seed=0, zero3=False)
    assert (use_chunked_loss(model, setting, on_gpu=on_gpu) is not None) is chunks
