"""The memory plan against the table of the ZeRO paper (arXiv 1910.02054, section 3) and against the bytes of real engines."""

from __future__ import annotations

import pytest

from harness.preflight.memory import plan_memory
from tests.preflight.held import held

N = 1_000_000


def _config(stage: int, optimizer: str = "none", param: str = "none") -> dict:
    zero = {"stage": stage}
    if optimizer != "none":
        zero["offload_optimizer"] = {"device": optimizer}
    if param != "none":
        zero["offload_param"] = {"device": param}
    return {"zero_optimization": zero, **({"data_types": {"grad_accum_dtype": "fp32"}} if stage else {})}


@pytest.mark.parametrize("stage, ranks, each", [(0, 4, 2 + 6 + 12), (1, 4, 2 + 6 + 3), (2, 4, 2 + 1.5 + 3), (3, 4, 0.5 + 2 + 3), (3, 1, 22)])
def test_states_on_a_device_in_bf16(stage, ranks, each):
    """2 bytes of weights, 4 of gradients (accumulated in fp32) and their copies, 12 of master and moments, each divided from its stage on."""
    plan = plan_memory(N, _config(stage), precision="bf16", ranks=ranks, local_ranks=ranks)
    assert (plan.device, plan.host, plan.nvme) == (each * N, 0, 0)


def test_a_host_holds_what_its_own_ranks_hold():
    config = _config(3, "cpu", "cpu")
    one, two = (plan_memory(N, config, precision="bf16", ranks=4, local_ranks=local) for local in (4, 2))
    assert one.host == 2 * two.host == (2 + 4 + 4 + 12) * N


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
HELD = {
    "zero1 in fp32": ("zero1", {"precision": "fp32"}), "zero1_offload_cpu": ("zero1_offload_cpu", {}), "zero3_offload_cpu": ("zero3_offload_cpu", {}),
}
MORE_HELD = {
    "zero1": ("zero1", {}), "zero2": ("zero2", {}), "zero3": ("zero3", {}), "zero1_offload_cpu in fp32": ("zero1_offload_cpu", {"precision": "fp32"}),
    "zero0 in fp32": ("zero1", {"precision": "fp32", "zero": {"stage": 0}}), "zero0": ("zero1", {"accumulate_in": "model", "zero": {"stage": 0}}),
    "zero2 in fp32": ("zero2", {"precision": "fp32"}), "zero3 in fp32": ("zero3", {"precision": "fp32"}),
    "zero3_offload_cpu in fp32": ("zero3_offload_cpu", {"precision": "fp32"}), "zero2, offload": ("zero2", {"zero": OFFLOAD}),
    "zero2, offload in fp32": ("zero2", {"precision": "fp32", "zero": OFFLOAD}), "zero3, offload of the optimizer": ("zero3", {"zero": OFFLOAD}),
    "zero1, sums in bf16": ("zero1", {"accumulate_in": "model"}), "zero2, sums in bf16": ("zero2", {"accumulate_in": "model"}),
    "zero3, sums in bf16": ("zero3", {"accumulate_in": "model"}), "zero1, offload, sums in bf16": ("zero1_offload_cpu", {"accumulate_in": "model"}),
    "zero2, offload, sums in bf16": ("zero2", {"accumulate_in": "model", "zero": OFFLOAD}),
    "zero3, offload, sums in bf16": ("zero3_offload_cpu", {"accumulate_in": "model"}),
}
CASES = [pytest.param(*case, id=name) for name, case in HELD.items()]
CASES += [pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in MORE_HELD.items()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options", [("zero1", {"precision": "fp32"}), ("zero1", {"accumulate_in": "model"}), ("zero1_offload_cpu", {}), ("zero2", {})]
)
def test_one_rank_holds_what_is_planned(ranks1, name, options):
    found = ranks1.run(held, name, options)[0]
    plan = plan_memory(found["parameters"], found["config"], precision=options.get("precision", "bf16"), ranks=1, local_ranks=1)
    more = {place: round((found[place] - getattr(plan, place)) / found["parameters"], 2) for place in ("device", "host")}
    assert all(-0.02 <= one <= 0.45 for one in more.values()), more


@pytest.mark.parametrize("name, options", CASES)
def test_an_engine_holds_what_is_planned(ranks2, name, options):
    """Two ranks; what comes on top is activations, small buffers and the tail of a tensor that lies across both ranks."""
    found = ranks2.run(held, name, options)[0]
    size = found["parameters"]
    plan = plan_memory(size, found["config"], precision=options.get("precision", "bf16"), ranks=2, local_ranks=1)
    more = {place: round((found[place] - getattr(plan, place)) / size, 2) for place in ("device", "host")}
    assert all(-0.02 <= one <= 0.45 for one in more.values()), more


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero1_offload_cpu"])
def test_a_stage_of_a_pipeline_holds_what_is_planned(ranks4, name):
    for found in ranks4.run(held, name, {"stages": 2}):
        plan = plan_memory(found["parameters"], found["config"], precision="bf16", ranks=2, local_ranks=1)
        more = [(found[place] - getattr(plan, place)) / found["parameters"] for place in ("device", "host")]
        assert all(-0.02 <= one <= 0.45 for one in more), more


@pytest.mark.slow
def test_nvme_holds_what_is_planned(ranks2, tmp_path):
    """With tensors that are large enough to be swapped."""
    found = ranks2.run(held, "zero3_offload_nvme", {"nvme": str(tmp_path), "model": {"width": 512, "vocabulary": 8192}})[0]
    plan = plan_memory(found["parameters"], found["config"], precision="bf16", ranks=2, local_ranks=2)
    assert found["nvme"] == pytest.approx(plan.nvme, rel=0.03) and plan.nvme == 16 * found["parameters"]
    assert 2 * found["host"] == pytest.approx(plan.host, rel=0.03) and plan.device == 0


@pytest.mark.parametrize("stage, ranks, local_ranks, on_a_host", [(3, 4, 2, 6), (1, 2, 2, 12), (0, 4, 4, 12)])
def test_a_host_copies_what_its_ranks_write(stage, ranks, local_ranks, on_a_host):
    plan = plan_memory(N, _config(stage), precision="bf16", ranks=ranks, local_ranks=local_ranks)
    assert (plan.checkpoint, plan.copy) == (12 * N, on_a_host * N)


def test_stages_of_a_pipeline_copy_no_more_than_there_is():
    assert plan_memory(N, _config(1), precision="bf16", ranks=1, local_ranks=2, all_parameters=3 * N // 2).copy == 18 * N
