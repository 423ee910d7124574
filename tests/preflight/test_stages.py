"""The plan of a pipeline: every block once, in-flight micro-batches counted, and a warning where one stage holds the others up."""

from __future__ import annotations

import pytest

from harness.config.batch import BatchEquation
from harness.model.partition import skeleton
from harness.preflight.stages import bubble, plan_stages, warnings
from harness.testing.models import tiny_config
from tests.engine import work


def planned(*, stages: int, accumulation: int, layers: int = 8, checkpointing: int = 0, vocabulary: int = 320, partition: str = "flops"):
    run = work.run_file(micro_batch=2, stages=stages, checkpointing=checkpointing)
    run = run.model_copy(update={"engine": run.engine.model_copy(update={"partition": partition})})
    config = tiny_config("llama", layers=layers, width=64, vocabulary=vocabulary)
    return plan_stages(run, config, BatchEquation(2 * accumulation, 2, accumulation, 1, work.LENGTH, stages))


@pytest.mark.parametrize("stages, micro_batches, share", [(2, 8, 1 / 9), (4, 16, 3 / 19), (4, 1, 3 / 4), (1, 5, 0.0)])
def test_the_share_of_waiting(stages, micro_batches, share):
    assert bubble(stages, micro_batches) == pytest.approx(share)


@pytest.mark.parametrize("partition", ["flops", "parameters", "time"])
def test_every_block_is_in_one_stage(partition):
    cut = planned(stages=3, accumulation=4, partition=partition)
    assert [stage.first for stage in cut] == [0, *(stage.stop for stage in cut[:-1])] and cut[-1].stop == 8
    whole = skeleton(tiny_config("llama", layers=8, width=64))
    assert sum(stage.parameters for stage in cut) == sum(p.numel() for p in whole.parameters())


def test_earlier_stages_keep_more_micro_batches():
    four, one = planned(stages=4, accumulation=8), planned(stages=4, accumulation=1)
    per_block = [stage.activations / (stage.stop - stage.first) for stage in four[:3]]
    assert per_block == pytest.approx([per_block[2] * 2, per_block[2] * 1.5, per_block[2]], rel=1e-6), "4, 3 and 2 in flight"
    assert one[0].activations * 4 == four[0].activations, "never more than there are"


def test_recomputing_keeps_less():
    kept = [planned(stages=2, accumulation=4, checkpointing=every)[0].activations for every in (0, 2, 1)]
    assert kept[0] > kept[1] > kept[2] > 0


def test_a_head_that_outweighs_the_blocks_is_warned_of():
    assert warnings(planned(stages=2, accumulation=4)) == []
    heavy = warnings(planned(stages=4, accumulation=4, layers=4, vocabulary=8192))
    assert len(heavy) == 1 and heavy[0].startswith("Stage 3 has")
