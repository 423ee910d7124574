"""Five minutes of faults at random times, each kind at least once on a machine of its own."""

from __future__ import annotations

import pytest

from tests.soak import Soak


@pytest.mark.slow
def test_a_run_that_something_happens_to_all_the_time_is_the_undisturbed_run(tmp_path):
    soak = Soak(tmp_path, minutes=5.0, every_s=25.0, seed=0)
    found = soak.run()
    assert len(soak.done) >= 4 and len(found.starts) > 4, soak.done
