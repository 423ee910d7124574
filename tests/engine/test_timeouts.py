"""`engine.timeout_minutes` holds in every group of ranks that trains, not in the first one alone."""

from __future__ import annotations

from datetime import timedelta

import pytest

from harness.testing.pool import TIMEOUT_MINUTES
from tests.engine import work


def timeouts(stages: int) -> list[timedelta]:
    import torch
    from torch.distributed.distributed_c10d import _world

    engine = work.engine_of("zero1", stages=stages)
    found = [group._get_backend(torch.device("cpu")).options._timeout for group in _world.pg_map]
    engine.close()
    return found


@pytest.mark.parametrize("stages", [1, 2])
def test_of_every_group(ranks2, stages):
    for found in ranks2.run(timeouts, stages):
        assert len(found) > 1 and set(found) == {timedelta(minutes=TIMEOUT_MINUTES)}
