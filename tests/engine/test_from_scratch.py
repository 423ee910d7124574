"""From scratch and from a folder: every tensor equals a single-process build, under every stage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from harness.testing.models import ARCHITECTURES, tiny_config
from tests.engine import work


def built(name: str, kind: str, weights: str | None, tied: bool | None) -> dict[str, Any]:
    """The masters of a fresh engine and the logits that it gives, on this rank."""
    import copy

    from harness import distributed
    from harness.engine.zero import ZeroEngine

    run = work.run_file(micro_batch=2)
    merged = work.ds_config(name, run, ranks=distributed.size(), nvme="unused")
    engine = ZeroEngine(run, tiny_config(kind, tied=tied), copy.deepcopy(merged), device=torch.device("cpu"), weights=weights)
    engine.deepspeed.eval()
    ids = torch.arange(24)[None] % 100
    with torch.no_grad():
        logits = engine.deepspeed(input_ids=ids, use_cache=False).logits.numpy()
    answer = {"weights": work.masters(engine), "logits": logits, "tied": engine.tied()}
    engine.close()
    distributed.barrier()
    return answer


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload_cpu"])
def test_fresh_weights(ranks2, kind, name):
    from harness.model.build import build

    expected = {n: p.detach().numpy() for n, p in build(tiny_config(kind), path=None, precision="fp32", seed=0, zero3=False).named_parameters()}
    for answer in ranks2.run(built, name, kind, None, None):
        assert answer["weights"].keys() == expected.keys()
        for tensor, values in expected.items():
            assert np.array_equal(answer["weights"][tensor], values), tensor


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_weights_from_a_folder(ranks2, tmp_path, kind, tied, name):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, tied=tied)).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=torch.arange(24)[None] % 100, use_cache=False).logits.numpy()
    for answer in ranks2.run(built, name, kind, str(tmp_path), tied):
        assert np.allclose(answer["logits"], expected, atol=1e-6)
        assert bool(answer["tied"]) == tied
