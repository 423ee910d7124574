"""Which rank is silent for too long: learned bounds, the one to blame, and no alarm while nothing is known."""

from __future__ import annotations

import pytest

from harness.heartbeat import Beat
from harness.launch.silence import LEAST_S, START_S, TIMES, SilenceWatch


def beats(*at_s: float, step: int = 5, count: int = 10, first: int = 1) -> dict[int, Beat]:
    return {rank: Beat(one, step, "forward", count, first=first) for rank, one in enumerate(at_s)}


def test_the_one_that_fell_silent_first_is_to_blame():
    silent = SilenceWatch(10.0).judge(beats(102.0, 100.0, 103.0), set(), now_s=113.0)
    assert silent is not None and (silent.rank, silent.seconds, silent.bound_s, silent.stopped) == (1, 13.0, 10.0, False)


def test_ranks_that_wait_for_one_that_works_are_not_given_up():
    watch = SilenceWatch(10.0)
    assert all(watch.judge(beats(100.0 + second, 100.0), set(), now_s=100.0 + second) is None for second in range(60))


def test_a_silent_rank_is_found_before_the_bound_is_over():
    """Looked at once a second: whenever the looks fall, one of them finds it in time."""
    watch, looks = SilenceWatch(10.0), [100.0 + 0.1 * tenth for tenth in range(100)]
    found = [now_s for now_s in looks if watch.judge(beats(100.0, 100.0), set(), now_s=now_s)]
    assert 108.0 < found[0] <= 109.0 and len(found) >= 10


def test_one_that_stands_still_is_to_blame_although_another_is_older():
    silent = SilenceWatch(10.0).judge(beats(100.0, 102.0), {1}, now_s=111.0)
    assert silent is not None and (silent.rank, silent.stopped) == (1, True)
    assert SilenceWatch(10.0).judge(beats(110.0, 100.0), {1}, now_s=110.0), "whatever the other does meanwhile"


@pytest.mark.parametrize(("step", "first"), [(0, 0), (1, 1), (401, 401)])
@pytest.mark.parametrize("bound_s", [10.0, None])
def test_before_the_first_step_of_a_start_is_done_the_setting_does_not_count(step, first, bound_s):
    watch = SilenceWatch(bound_s)
    assert watch.judge(beats(100.0, 100.0, step=step, first=first), {0}, now_s=100.0 + START_S - 2) is None
    assert watch.judge(beats(100.0, 100.0, step=step, first=first), {0}, now_s=100.0 + START_S + 1) is not None


def test_without_a_setting_the_bound_follows_the_longest_pause():
    watch = SilenceWatch(None)
    assert watch.judge(beats(100.0, count=1), set(), now_s=100.0 + LEAST_S - 2) is None
    assert watch.judge(beats(110.0, count=2), set(), now_s=110.0) is None, "a pause of ten seconds was seen"
    assert watch.judge(beats(110.0, count=2), set(), now_s=110.0 + 10 * TIMES - 2) is None
    silent = watch.judge(beats(110.0, count=2), set(), now_s=110.0 + 10 * TIMES + 1)
    assert silent is not None and silent.bound_s == 10 * TIMES
