"""The memory plan against the table of the ZeRO paper (arXiv 1910.02054, section 3) and against a real optimizer's bytes."""

from __future__ import annotations

import pytest

from harness.preflight.memory import plan_memory

N = 1_000_000


def _config(stage: int, optimizer: str = "none", param: str = "none") -> dict:
    zero = {"stage": stage}
    if optimizer != "none":
        zero["offload_optimizer"] = {"device": optimizer}
    if param != "none":
        zero["offload_param"] = {"device": param}
    return {"zero_optimization": zero}


@pytest.mark.parametrize("stage, ranks, each", [(0, 4, 2 + 4 + 12), (1, 4, 2 + 4 + 3), (2, 4, 2 + 1 + 3), (3, 4, 0.5 + 1 + 3), (3, 1, 18)])
def test_states_on_a_device_in_bf16(stage, ranks, each):
    """2 bytes of weights, 4 of gradients (accumulated in fp32), 12 of master and moments, each divided from its stage on."""
    plan = plan_memory(N, _config(stage), precision="bf16", ranks=ranks, local_ranks=ranks)
    assert (plan.device, plan.host, plan.nvme) == (each * N, 0, 0)


def test_offload_moves_bytes_and_loses_none():
    inside = plan_memory(N, _config(3), precision="bf16", ranks=2, local_ranks=2)
    cpu = plan_memory(N, _config(3, "cpu", "cpu"), precision="bf16", ranks=2, local_ranks=2)
    nvme = plan_memory(N, _config(3, "nvme", "none"), precision="bf16", ranks=2, local_ranks=2)
    assert cpu.device == 0 and cpu.host == 2 * inside.device
    assert nvme.nvme == 12 * N and nvme.device == N and nvme.host == 4 * N


def test_fp32_has_no_second_master():
    assert plan_memory(N, _config(0), precision="fp32", ranks=1, local_ranks=1).device == (4 + 4 + 8) * N


@pytest.mark.parametrize("stage, ranks, local_ranks, on_a_host", [(3, 4, 2, 6), (1, 2, 2, 12), (0, 4, 4, 12)])
def test_a_host_copies_what_its_ranks_write(stage, ranks, local_ranks, on_a_host):
    plan = plan_memory(N, _config(stage), precision="bf16", ranks=ranks, local_ranks=local_ranks)
    assert (plan.checkpoint, plan.copy) == (12 * N, on_a_host * N)


def test_stages_of_a_pipeline_copy_no_more_than_there_is():
    assert plan_memory(N, _config(1), precision="bf16", ranks=1, local_ranks=2, all_parameters=3 * N // 2).copy == 18 * N
