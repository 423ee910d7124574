"""What a model keeps beside its parameters, such as the bias of a router, is saved, resumed and exported with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint import shelf
from harness.checkpoint.read import SliceReader
from harness.formats.manifest import BUFFERS, read_manifest, write_manifest
from harness.model.families import FAMILIES
from harness.testing.models import VOCABULARY, tiny_config
from harness.testing.pool import RankFailure
from tests.checkpoint.fabricate import commit_groups
from tests.engine import work

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
VALUES = (0.5, -0.25, 1.5, 0.125)


def config() -> Any:
    from transformers import Glm4MoeConfig

    return Glm4MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, n_routed_experts=len(VALUES), num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, head_dim=8,
        max_position_embeddings=256, use_cache=False, pad_token_id=None,
    )


def leg(weights: str | None, run_dir: str, name: str, precision: str) -> list[float]:
    """On one rank: begin with `weights`, or go on from the newest checkpoint; save it after a step. Gives the bias and a loss."""
    from harness import distributed
    from harness.checkpoint.disks import Disks
    from harness.engine.open import open_engine
    from harness.testing.rows import cut, random_rows
    from harness.train.rollback import load
    from harness.world import World

    rank, ranks = distributed.rank(), distributed.size()
    run, place, world = work.run_file(precision=precision), Path(run_dir), World(rank=rank, size=ranks)
    merged = work.ds_config(name, run, ranks=ranks, nvme="unused")
    engine = open_engine(run, config(), copy.deepcopy(merged), device=torch.device("cpu"), weights=weights, fresh=weights is not None)
    if weights is None:
        folder = shelf.committed(place)[0][1]
        load(engine, (folder, read_manifest(folder)), Disks.shared(world))
    batch = cut(random_rows(1, rows=work.ROWS, length=work.LENGTH, vocabulary=VOCABULARY), micro_batch=1, rank=rank, ranks=ranks)
    sums = engine.eval_sums(batch.micro_batches)
    bias = engine.model.state_dict()[BIAS].float().tolist()
    if weights is not None:
        place.mkdir(exist_ok=True)
        fields = {"step": 1, "rows_consumed": 0, "data_fingerprint": "f", "parameters": engine.parameters(), "tied": engine.tied(),
                  "state": {"step": 1, "best_loss": None, "best_step": 0}}
        commit_groups(engine.named_slices(), run_dir=place, fields=fields, attempt=1, world=world, buffers=engine.buffers())
    engine.close()
    distributed.barrier()
    return [*bias, float(sums[0])]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model, folder = AutoModelForCausalLM.from_config(config()), tmp_path_factory.mktemp("glm")
    model.get_buffer(BIAS).copy_(torch.tensor(VALUES))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("saved, resumed, precision", [("zero1", "zero3", "fp32"), pytest.param("zero3", "zero1", "bf16", marks=pytest.mark.slow)])
def test_a_resume_and_an_export_have_the_bias_of_the_router(ranks2, tmp_path, weights, saved, resumed, precision):
    from transformers import AutoModelForCausalLM

    from harness.checkpoint.export import export

    before = ranks2.run(leg, str(weights), str(tmp_path / "run"), saved, precision)
    after = ranks2.run(leg, None, str(tmp_path / "run"), resumed, precision)
    assert [answer[:-1] for answer in before + after] == [list(VALUES)] * 4
    assert [answer[-1] for answer in after] == pytest.approx([answer[-1] for answer in before], rel=1e-5 if precision == "fp32" else 5e-3)
    (tmp_path / "run" / "model").mkdir()
    config().save_pretrained(tmp_path / "run" / "model")
    loaded, info = AutoModelForCausalLM.from_pretrained(export(tmp_path / "run", tmp_path / "out"), output_loading_info=True)
    assert loaded.get_buffer(BIAS).float().tolist() == list(VALUES) and not info["missing_keys"] and not info["unexpected_keys"]


def test_a_checkpoint_that_lacks_them_is_refused(ranks2, tmp_path, weights):
    ranks2.run(leg, str(weights), str(tmp_path / "run"), "zero1", "fp32")
    folder = shelf.committed(tmp_path / "run")[0][1]
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.model_copy(update={"files": tuple(entry for entry in manifest.files if entry.file != BUFFERS)}))
    assert shelf.inspect(folder)[1] == [] and SliceReader(folder, read_manifest(folder)).buffers() == {}
    with pytest.raises(RankFailure, match=f"lacks 1 tensors that the model keeps beside its parameters, the first is {BIAS}"):
        ranks2.run(leg, None, str(tmp_path / "run"), "zero1", "fp32")


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_family_that_is_cut_into_stages_has_any(kind):
    from harness.engine.common import _persistent_buffers
    from harness.model.partition import skeleton

    assert _persistent_buffers(skeleton(tiny_config(kind), torch.float32)) == {}
