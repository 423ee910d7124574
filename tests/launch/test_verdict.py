"""Whose word counts when a job has ended: rank 0's, another rank's, or what the starter saw."""

from __future__ import annotations

import signal

import pytest

from harness.formats.outcome import Outcome
from harness.heartbeat import Beat
from harness.launch.verdict import End, Ended, judge

BEAT = Beat(1.0, 7, "backward", 9)
DONE, STOPPED = Outcome("done", 0, "", 9, 1), Outcome("stopped", 75, "", 9, 1)
LOST, FAILED = Outcome("lost", 75, "echo", 9, 1), Outcome("failed", 1, "own", 9, 1)
RANK_1 = Outcome("failed", 1, "of rank 1", 9, 1)
KILLED, CRASHED = End(1, -signal.SIGKILL, BEAT, "h1"), End(1, -signal.SIGSEGV, BEAT, "h1")


@pytest.mark.parametrize(("first", "asked", "told", "state", "code"), [
    (None, False, DONE, "done", 0),
    (None, False, None, "failed", 1),
    (End(0, 75, BEAT, "h1"), True, STOPPED, "stopped", 75),
    (KILLED, False, DONE, "done", 0),
    (KILLED, False, LOST, "lost", 75),
    (KILLED, False, None, "lost", 75),
    (KILLED, True, None, "stopped", 75),
    (CRASHED, False, LOST, "failed", 1),
    (End(0, 1, BEAT, "h1"), False, FAILED, "failed", 1),
    (End(0, 1, BEAT, "h1"), True, FAILED, "failed", 1),
    (End(1, 1, BEAT, "h1"), False, LOST, "failed", 1),
    (End(1, 75, BEAT, "h1"), False, LOST, "lost", 75),
])
def test_the_verdict(first, asked, told, state, code):
    final = judge(Ended(asked, first), told, last_words=lambda rank: RANK_1 if rank == 1 else None)
    assert (final.state, final.code) == (state, code)


def test_the_words_are_of_the_rank_that_failed_first():
    assert judge(Ended(False, End(1, 1, BEAT, "h1")), LOST, last_words=lambda rank: RANK_1).reason == "of rank 1"
    assert judge(Ended(False, KILLED), LOST, last_words=lambda rank: None).reason == "Rank 1 on h1 was ended by SIGKILL in phase backward of step 7."
