"""When a run is started again, how long it waits, and when it gives up."""

from __future__ import annotations

import pytest

from harness.formats import ledger
from harness.formats.outcome import Outcome, read_outcome
from harness.launch import run as launches
from harness.supervise import relaunch


@pytest.mark.parametrize(("state", "code", "has_trained", "again"), [
    ("lost", 75, False, True), ("failed", 1, True, True), ("failed", 1, False, False),
    ("done", 0, True, False), ("stopped", 75, True, False), ("refused", 2, True, False), ("anomaly", 3, True, False), ("check failed", 4, True, False),
])
def test_worth_another_start(state, code, has_trained, again):
    assert relaunch.is_worth_another(Outcome(state, code, "", 0, 1), has_trained=has_trained) is again


def test_pauses_grow_up_to_a_minute():
    assert [relaunch.pause(number) for number in (1, 2, 3, 7, 50)] == [1, 2, 4, 60, 60]


@pytest.fixture
def starts(tmp_path, monkeypatch):
    """Starts that end as told, one after another, each leaving a checkpoint or not."""

    def play(*ends: tuple[str, int, bool]) -> list[str]:
        seen, remaining = [], list(ends)

        def run(plan: str) -> Outcome:
            state, code, saves = remaining.pop(0)
            seen.append(plan)
            if saves:
                ledger.append(tmp_path, "save", step=len(seen), checkpoint=f"step-{len(seen):06d}")
            return Outcome(state, code, f"end {len(seen)}", len(seen), len(seen))

        monkeypatch.setattr(launches, "run", run)
        monkeypatch.setattr(relaunch, "pause", lambda in_a_row: 0.0)
        plans = iter(range(100))
        play.ended = relaunch.launch(lambda: f"plan {next(plans)}", run_dir=tmp_path, restarts=2)
        return seen

    return play


def test_each_start_has_a_plan_of_its_own_until_the_run_is_done(starts, tmp_path):
    assert starts(("lost", 75, False), ("lost", 75, True), ("done", 0, True)) == ["plan 0", "plan 1", "plan 2"]
    assert starts.ended.code == 0
    assert [(event["reason"], event["in_a_row"]) for event in ledger.read(tmp_path) if event["kind"] == "relaunch"] == [("end 1", 1), ("end 2", 1)]


def test_a_crash_loop_ends_with_its_reason(starts, tmp_path):
    assert len(starts(*[("lost", 75, False)] * 9)) == 3
    assert (starts.ended.code, starts.ended.state) == (1, "failed")
    assert "3 times in a row without a new checkpoint, the last time so: end 3" in starts.ended.reason
    assert read_outcome(tmp_path) == starts.ended


def test_new_checkpoints_let_it_go_on(starts):
    assert len(starts(*[("lost", 75, True)] * 8, ("stopped", 75, True))) == 9
    assert starts.ended.state == "stopped"
