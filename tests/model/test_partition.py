"""Stages: the cut is the best there is, costs are those of the model, and what cannot be cut is refused by name."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import Refused
from harness.model.families import family_of
from harness.model.measure import time_costs
from harness.model.partition import Costs, balance, check_stages, flop_costs, parameter_costs, skeleton, stage_bounds
from harness.model.stage import build_stage
from harness.testing.models import tiny_config
from harness.world import Grid

COST = st.floats(min_value=0.0, max_value=100.0, allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(blocks=st.lists(COST, min_size=1, max_size=9), embedding=COST, head=COST, data=st.data())
def test_no_cut_has_a_cheaper_dearest_stage(blocks, embedding, head, data):
    stages = data.draw(st.integers(1, len(blocks)))
    costs = Costs(embedding, tuple(blocks), head)
    bounds = balance(costs, stages)
    assert bounds[0] == 0 and bounds[-1] == len(blocks) and list(bounds) == sorted(set(bounds)), "every stage has a block"
    every = [(0, *inner, len(blocks)) for inner in combinations(range(1, len(blocks)), stages - 1)]
    dearest = min(max(costs.of_stages(cut)) for cut in every) * (1 + 1e-9) + 1e-9
    assert max(costs.of_stages(bounds)) <= dearest
    squares = min(sum(cost**2 for cost in costs.of_stages(cut)) for cut in every if max(costs.of_stages(cut)) <= dearest)
    assert sum(cost**2 for cost in costs.of_stages(bounds)) <= squares * (1 + 1e-6) + 1e-6


def test_equal_blocks_are_shared_evenly():
    assert balance(Costs(0, (1.0,) * 12, 0), 4) == (0, 3, 6, 9, 12)
    assert balance(Costs(0, (1.0,) * 12, 5.4), 4)[3:] == (11, 12), "GPT-2's head weighs as much as five blocks"


@pytest.mark.parametrize("kind, tied", [("gpt2", True), ("llama", False), ("qwen2", True), ("gpt_neox", False)])
def test_costs_count_every_parameter(kind, tied):
    config = tiny_config(kind, layers=3, tied=tied)
    model = skeleton(config)
    costs = parameter_costs(model)
    embedding = model.get_input_embeddings().weight.numel()
    assert sum(costs.of_stages((0, 1, 3))) == sum(p.numel() for p in model.parameters()) + (embedding if tied else 0)
    flops = flop_costs(model, sequence_length=64)
    assert flops.embedding == 0 and flops.head >= 6 * embedding and len(flops.blocks) == 3


def test_measured_costs_cut_too():
    config = tiny_config("llama", layers=6)
    costs = time_costs(config, dtype=torch.float32, device=torch.device("cpu"), micro_batch=2, sequence_length=32)
    assert len(costs.blocks) == 6 and min(costs.blocks) > 0 and costs.head > 0
    assert time_costs(config, dtype=torch.float32, device=torch.device("cpu"), micro_batch=2, sequence_length=32, recompute_every=3).blocks[1] > 0
    given = Costs(0.0, (1.0,) * 6, 4.0)
    assert stage_bounds(config, stages=2, method="time", sequence_length=32, measured=given) == (0, 5, 6)
    assert stage_bounds(config, stages=2, method="flops", sequence_length=32) == (0, 3, 6)


def test_a_recomputed_block_costs_a_third_more():
    model = skeleton(tiny_config("llama", layers=4))
    plain, mixed = (flop_costs(model, sequence_length=32, recompute_every=every) for every in (0, 2))
    assert [b / a for a, b in zip(plain.blocks, mixed.blocks, strict=True)] == pytest.approx([4 / 3, 1, 4 / 3, 1]) and plain.head == mixed.head


def test_unknown_families_and_too_many_stages_are_refused_by_name():
    from transformers import BloomConfig

    with pytest.raises(Refused, match="'bloom' cannot be cut"):
        family_of(BloomConfig(n_layer=2, hidden_size=32, n_head=4, vocab_size=64))
    with pytest.raises(Refused, match="2 blocks, too few for 3 pipeline stages"):
        check_stages(skeleton(tiny_config("gpt2", layers=2)), 3)


@pytest.mark.parametrize("kind, tied", [("gpt2", True), ("llama", False), ("qwen2", True)])
@pytest.mark.parametrize("from_folder", [False, True])
def test_stages_hold_the_tensors_of_the_whole_model(tmp_path, kind, tied, from_folder):
    """Chained in one process they give its logits; from scratch and from a folder written in several files."""
    from harness.model.build import build

    config = tiny_config(kind, layers=5, tied=tied)
    whole = build(config, path=None, precision="fp32", seed=4, zero3=False).eval()
    if from_folder:
        whole.save_pretrained(tmp_path, max_shard_size="50KB")
    bounds, held = (0, 2, 3, 5), set()
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None]
    ids = torch.arange(24)[None] * 7 % 300
    carried = (ids, positions)
    for number in range(3):
        stage = build_stage(config, bounds, number, weights=str(tmp_path) if from_folder else None, precision="fp32", seed=4).eval()
        for local, name in stage.names.items():
            assert torch.equal(stage.get_parameter(local), whole.get_parameter(name)), name
            held.add(name)
        assert not any(p.is_meta for p in [*stage.parameters(), *stage.buffers()])
        carried = stage(carried)
    assert held == {name for name, _ in whole.named_parameters()}
    with torch.no_grad():
        expected = whole(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert torch.allclose(carried, expected, atol=1e-6)


def test_files_of_the_bare_decoder_and_of_older_names_are_read(tmp_path):
    from safetensors.torch import load_file, save_file

    from harness.model.build import build

    for kind, rename in (("gpt2", lambda n: n.removeprefix("transformer.")), ("gpt_neox", lambda n: n.replace("lm_head.", "embed_out."))):
        config, folder = tiny_config(kind, layers=2), tmp_path / kind
        whole = build(config, path=None, precision="fp32", seed=1, zero3=False)
        whole.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
        stage = build_stage(config, (0, 1, 2), 1, weights=str(folder), precision="fp32", seed=0)
        assert all(torch.equal(stage.get_parameter(local), whole.get_parameter(name)) for local, name in stage.names.items())


def test_the_grid_keeps_a_stage_on_neighbouring_ranks():
    grids = [Grid(stages=2, ranks=6, rank=rank) for rank in range(6)]
    assert [(g.pp_stage, g.dp_rank, g.dp_size) for g in grids] == [(0, 0, 3), (0, 1, 3), (0, 2, 3), (1, 0, 3), (1, 1, 3), (1, 2, 3)]
    assert [g.rank_of(1) for g in grids] == [3, 4, 5, 3, 4, 5] and grids[0].is_first and grids[5].is_last
