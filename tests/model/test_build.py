"""Models: fresh weights by name, weights that fit, documents that stay apart."""

from __future__ import annotations

import copy

import pytest
import torch

from harness.errors import Refused
from harness.model.build import build, check_weights, decay_groups, enable_activation_checkpointing, fuse_activations, initialize
from harness.testing.models import ARCHITECTURES, VOCABULARY, tiny_config


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_fresh_weights_are_a_function_of_the_seed(kind):
    config = tiny_config(kind)
    one, two, other = (build(config, path=None, precision="fp32", seed=seed, zero3=False) for seed in (1, 1, 2))
    differs = False
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        differs |= not torch.equal(a, c)
    assert differs


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_fresh_weights_have_the_models_own_distribution(kind):
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind)
    ours = build(config, path=None, precision="fp32", seed=1, zero3=False)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.2, abs=1e-6), name
        assert a.mean().item() == pytest.approx(b.mean().item(), abs=0.01), name


def test_initialize_does_not_touch_the_global_generator():
    model = build(tiny_config("gpt2"), path=None, precision="fp32", seed=1, zero3=False)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    initialize(model, seed=9, zero3=False)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("change, told", [({"n_layer": 3}, "missing"), ({"n_layer": 1}, "unexpected"), ({"n_inner": 77}, "mismatched")])
def test_weights_that_do_not_fit_are_refused(tmp_path, change, told):
    model = build(tiny_config("gpt2"), path=None, precision="fp32", seed=1, zero3=False)
    model.save_pretrained(tmp_path)
    check_weights(str(tmp_path), tiny_config("gpt2"), where="model.path")
    config = tiny_config("gpt2")
    for key, value in change.items():
        setattr(config, key, value)
    with pytest.raises(Refused, match=told):
        check_weights(str(tmp_path), config, where="model.path")


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("every", [0, 1, 2])
def test_documents_of_a_packed_row_do_not_see_each_other(kind, every):
    model = build(tiny_config(kind), path=None, precision="fp32", seed=1, zero3=False)
    enable_activation_checkpointing(model, every)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.randint(0, 200, (1, 24), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(14), torch.arange(10)])[None]
    changed = ids.clone()
    changed[0, :14] = (changed[0, :14] + 1) % 200
    before = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    after = model(input_ids=changed, position_ids=positions, use_cache=False).logits
    assert torch.equal(before[0, 14:], after[0, 14:])
    assert not torch.allclose(before[0, :14], after[0, :14])
    alone = model(input_ids=ids[:, 14:], position_ids=positions[:, 14:], use_cache=False).logits
    assert torch.allclose(before[0, 14:], alone[0], atol=1e-5)


def test_every_nth_block_is_recomputed():
    model = build(tiny_config("gpt2", layers=4), path=None, precision="fp32", seed=1, zero3=False)
    assert [enable_activation_checkpointing(model, every) for every in (0, 1, 2, 3)] == [0, 4, 2, 2]


def test_only_matrices_decay():
    model = build(tiny_config("gpt2"), path=None, precision="fp32", seed=1, zero3=False)
    matrices, rest = decay_groups(model, 0.1)
    assert matrices["weight_decay"] == 0.1 and all(p.ndim == 2 for p in matrices["params"])
    assert rest["weight_decay"] == 0.0 and all(p.ndim == 1 for p in rest["params"])
    assert len(matrices["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_gelu_in_one_kernel_is_the_same_gelu():
    from transformers import AutoModelForCausalLM
    from transformers.activations import NewGELUActivation

    plain = AutoModelForCausalLM.from_config(tiny_config("gpt2", width=64)).eval()
    fused = copy.deepcopy(plain)
    fuse_activations(fused)
    counts = [sum(type(module) is NewGELUActivation for module in model.modules()) for model in (plain, fused)]
    assert counts == [2, 0] and fused.config.activation_function == "gelu_new"
    ids = torch.randint(0, VOCABULARY, (2, 40))
    with torch.no_grad():
        theirs, ours = (model(ids).logits for model in (plain, fused))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_without_fresh_weights_none_are_made_and_ties_stand(monkeypatch):
    """For a checkpoint to follow: no initialisation runs, whatever is in memory."""
    monkeypatch.setattr("harness.model.build.initialize", lambda *a, **k: pytest.fail("weights were made"))
    monkeypatch.setattr(torch.nn.init, "normal_", lambda *a, **k: pytest.fail("weights were made"))
    model = build(tiny_config("gpt2"), path=None, precision="fp32", seed=1, zero3=False, fresh=False)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
