"""Any change of ranks, stage, offload or pipeline between two starts: the run goes on as if nothing had happened."""

from __future__ import annotations

import numpy as np
import pytest

from harness.checkpoint import shelf
from harness.formats.manifest import KINDS, read_manifest
from tests.engine.journey import STEPS, Leg, journey, prepare_data, tensors, travel

SLOW = pytest.mark.slow
TOLERANCE = {"losses": 1e-5, "master": 1e-6, "exp_avg": 3e-6, "exp_avg_sq": 5e-5}
"""Relative; of tensors, the norm of the difference to the norm of all of the kind; seen: 2e-7, 4e-7 and, with DeepSpeed's CPU Adam, 1e-5."""
SAME = "What was loaded is what was saved"
ZERO3, ZERO1, CPU, NVME = "zero3", "zero1", "zero3_offload_cpu", "zero3_offload_nvme"
WAYS = {
    "fewer ranks": [Leg(2, ZERO3), Leg(1, ZERO3)],
    "more ranks": [Leg(2, ZERO3), Leg(4, ZERO3)],
    "another stage": [Leg(2, ZERO3), Leg(2, ZERO1), Leg(4, "zero2")],
    "offload": [Leg(2, CPU), Leg(2, ZERO3), Leg(2, NVME), Leg(2, CPU)],
    "stages": [Leg(2, ZERO1, 2), Leg(4, ZERO1, 4), Leg(1, ZERO1)],
    "into a pipeline": [Leg(2, ZERO3), Leg(4, ZERO1, 2), Leg(4, CPU), Leg(4, ZERO1, 4)],
    "out of a pipeline": [Leg(2, "zero1_offload_cpu", 2), Leg(2, ZERO3), Leg(2, "zero1_offload_cpu", 2)],
}
FAST = ("more ranks", "stages")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("topology")
    prepare_data(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(base, ranks1):
    """With dropout, which depends on stages, and without: the run on one rank that never stopped, saved at the end of every leg."""
    known = {}

    def get(dropout: float):
        if dropout not in known:
            run_dir = base / f"whole-{dropout}"
            losses, lrs = [], []
            for number in range(1, 5):
                leg = ranks1.run(travel, str(base), str(run_dir), Leg(1, ZERO1), number * STEPS, dropout)[0]
                losses, lrs = losses + leg.losses, lrs + leg.lrs
            once = ranks1.run(travel, str(base), str(base / f"once-{dropout}"), Leg(1, ZERO1), 4 * STEPS, dropout)[0]
            assert once.losses == losses, "its saves leave no trace"
            known[dropout] = run_dir, losses, lrs
        return known[dropout]

    return get


def assert_goes_on(run_dir, legs, whole) -> None:
    """Losses and tensors to rounding; learning rates, groups, step counts, cursor and the rows to come exactly; the resume certified."""
    whole_dir, losses, lrs = whole
    count = len(legs) * STEPS
    assert [loss for leg in legs for loss in leg.losses] == pytest.approx(losses[:count], rel=TOLERANCE["losses"])
    assert [lr for leg in legs for lr in leg.lrs] == lrs[:count] and len(set(lrs[:count])) >= count - 1, "the learning rate moves"
    for leg in legs[1:]:
        assert any(text.startswith(SAME) for text in leg.said), leg.said
    ours, theirs = (shelf.checkpoints_folder(folder) / shelf.folder_name(count) for folder in (run_dir, whole_dir))
    mine, other = read_manifest(ours), read_manifest(theirs)
    assert (mine.rows_consumed, mine.adam_step, mine.state) == (other.rows_consumed, other.adam_step, other.state)
    assert mine.certificate.groups == other.certificate.groups and mine.certificate.rows == other.certificate.rows is not None
    assert mine.certificate.groups[0].lr == lrs[count - 1]
    got, expected = tensors(ours), tensors(theirs)
    for kind in KINDS:
        difference, total = (np.concatenate(list(part.values())) for part in ({n: got[kind][n] - expected[kind][n] for n in expected[kind]}, expected[kind]))
        assert np.linalg.norm(difference) <= TOLERANCE[kind] * np.linalg.norm(total), kind


@pytest.mark.parametrize("way", [way if way in FAST else pytest.param(way, marks=SLOW) for way in WAYS])
def test_another_topology_goes_on(base, undisturbed, ranks1, ranks2, ranks4, tmp_path, way):
    legs = WAYS[way]
    dropout = 0.0 if len({leg.stages for leg in legs}) > 1 else 0.1
    travelled = journey({1: ranks1, 2: ranks2, 4: ranks4}, base, tmp_path / "run", legs, dropout=dropout)
    assert_goes_on(tmp_path / "run", travelled, undisturbed(dropout))
