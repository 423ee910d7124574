"""The folders of a run's attempts, and which run they hold."""

from __future__ import annotations

import pytest

from harness.config.load import load
from harness.errors import Refused
from harness.train.attempt import Attempt, check_same_run
from tests.end_to_end.faults import write_run


def test_an_attempt_that_was_killed_as_it_began_is_passed_over(tmp_path):
    """Its folder is there, its run file is not; the one before it says which run it is."""
    run_file = write_run(tmp_path, [], [])
    (tmp_path / "run" / "attempts" / "0001" / "logs").mkdir(parents=True)
    check_same_run(load(run_file))
    assert Attempt.begin(load(run_file)).number == 2
    (tmp_path / "run" / "attempts" / "0003").mkdir()
    check_same_run(load(run_file))
    with pytest.raises(Refused, match="started with 0"):
        check_same_run(load(run_file, ["train.seed=5"]))
    assert Attempt.begin(load(run_file)).number == 4
