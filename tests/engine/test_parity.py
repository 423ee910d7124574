"""The numbers agree: every ZeRO stage and offload against one process in plain PyTorch and transformers, in fp32."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from tests.engine import work

LOSS, NORM, WEIGHT = 2e-6, 1e-5, 1e-4
NVME = {"width": 256, "vocabulary": 2048}


@cache
def reference(kind: str) -> dict:
    return work.plain(kind)


def differences(ours: dict, theirs: dict) -> tuple[float, float, float]:
    """Largest relative difference of losses, gradient norms and tensors; key biases, whose true gradient is zero, are left out."""
    losses = max(abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    norms = max(abs(a - b) / abs(b) for a, b in zip(ours["norms"], theirs["norms"], strict=True))
    assert ours["weights"].keys() == theirs["weights"].keys()
    weights = 0.0
    for name, tensor in theirs["weights"].items():
        mine = ours["weights"][name]
        if name.endswith("k_proj.bias"):
            continue
        if name.endswith("c_attn.bias"):
            third = len(tensor) // 3
            keep = np.r_[0:third, 2 * third : 3 * third]
            mine, tensor = mine[keep], tensor[keep]
        weights = max(weights, float(np.linalg.norm(mine - tensor) / np.linalg.norm(tensor)))
    return losses, norms, weights


def check(answers: list[dict], theirs: dict) -> None:
    losses, norms, weights = differences(answers[0], theirs)
    assert losses <= LOSS and norms <= NORM and weights <= WEIGHT, f"losses {losses:.1e}, norms {norms:.1e}, weights {weights:.1e}"


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero1_offload_cpu", "zero3_offload_cpu", "zero3_offload_nvme"])
def test_every_configuration_equals_plain_pytorch(ranks2, tmp_path, name):
    check(ranks2.run(work.train, name, "gpt2", 2, {"nvme": str(tmp_path)}), reference("gpt2"))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ["zero1", "zero3_offload_cpu"])
def test_other_architectures(ranks2, kind, name):
    check(ranks2.run(work.train, name, kind, 2, {}), reference(kind))


@pytest.mark.parametrize("name, kind", [("zero1", "gpt2"), ("zero3", "gpt2"), ("zero3_offload_cpu", "qwen2")])
def test_a_loss_in_chunks(ranks2, name, kind):
    check(ranks2.run(work.train, name, kind, 2, {"loss": "chunked", "checkpointing": 1}), reference(kind))


@pytest.mark.parametrize("micro_batch", [4, 2, 1])
def test_the_cut_does_not_matter(ranks2, micro_batch):
    check(ranks2.run(work.train, "zero3", "gpt2", micro_batch, {"checkpointing": 1}), reference("gpt2"))


def test_one_rank(ranks1):
    check(ranks1.run(work.train, "zero3", "gpt2", 8, {}), reference("gpt2"))


def partly_offloaded() -> list:
    """How far weights move, and what learning rate their optimizers hold, in a step at 0 and in one at LR."""
    engine = work.engine_of("zero3_offload_cpu", offload_optimizer={"device": "cpu", "ratio": 0.5}, sub_group_size=4000)
    devices = engine.deepspeed.optimizer.subgroup_to_device
    devices.update(dict.fromkeys(list(devices)[: len(devices) // 2], torch.device("cpu")))  # as on a GPU, where a second optimizer has them
    answers = []
    for step, lr in enumerate((0.0, work.LR), 1):
        before = work.masters(engine)
        engine.train_step(work.batch_of(step), step=step, lr=lr)
        after = work.masters(engine)
        moved = [np.abs(after[name] - before[name]).max() for name in before]
        answers.append((min(moved), max(moved), {group["lr"] for group in engine.hyper_parameters().values()}))
    used = any(engine.deepspeed.optimizer.backup_optimizer.state.values())
    engine.close()
    return [*answers, used]


def test_a_part_that_stays_on_the_gpu_has_the_same_learning_rate(ranks1):
    (still, moved, used), = ranks1.run(partly_offloaded)
    assert used and still == (0.0, 0.0, {0.0}) and moved[0] > 0.0 and moved[2] == {work.LR}


def first_step(stage: int) -> list[dict]:
    """Masters of a bf16 engine as built, and after a step."""
    engine = work.engine_of("zero1", stage=stage, precision="bf16", accumulate_in="model")
    answers = [work.masters(engine)]
    engine.train_step(work.batch_of(1), step=1, lr=work.LR)
    answers.append(work.masters(engine))
    steps = {group.adam_step for group in engine.named_slices()}
    engine.close()
    return [*answers, steps]


def test_without_zero_in_16_bit_the_first_step_is_the_first(ranks2):
    (before, after, steps), (fresh, expected, _) = ranks2.run(first_step, 0)[0], ranks2.run(first_step, 1)[0]
    assert all(np.array_equal(before[name], fresh[name]) for name in fresh) and steps == {1}
    for name in fresh:
        theirs = expected[name] - fresh[name]
        assert np.linalg.norm(after[name] - before[name] - theirs) <= 0.05 * np.linalg.norm(theirs), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload_cpu"])
def test_four_ranks(ranks4, name):
    check(ranks4.run(work.train, name, "gpt2", 2, {"checkpointing": 2}), reference("gpt2"))


@pytest.mark.parametrize("fault", ["mean of means", "decay on norms", "no decay", "16-bit weights"])
@pytest.mark.parametrize("name", ["zero1"])
def test_a_planted_fault_is_seen(ranks2, name, fault):
    losses, norms, weights = differences(ranks2.run(work.train, name, "gpt2", 2, {"fault": fault})[0], reference("gpt2"))
    assert losses > LOSS or norms > NORM or weights > WEIGHT


def test_dropout_does_not_depend_on_the_ranks(ranks1, ranks2):
    options = {"dropout": 0.1, "steps": 10}
    one = ranks1.run(work.train, "zero1", "gpt2", 2, options)[0]
    for name, checkpointing in (("zero1", 0), ("zero3", 0), ("zero3_offload_cpu", 1)):
        two = ranks2.run(work.train, name, "gpt2", 2, options | {"checkpointing": checkpointing})[0]
        assert two["losses"] == pytest.approx(one["losses"], rel=LOSS), name
    without = ranks1.run(work.train, "zero1", "gpt2", 2, {"steps": 10})[0]
    assert max(abs(a - b) for a, b in zip(one["losses"], without["losses"], strict=True)) > 1e-3, "dropout was on"
