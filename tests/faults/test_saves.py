"""Saves in one process that end at any of their boundaries."""

from __future__ import annotations

import builtins
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from harness.checkpoint import shelf
from tests.checkpoint.fabricate import save, state
from tests.checkpoint.test_commit import newest
from tests.faults import cases
from tests.faults.cases import Boundary, rows

DIED = 77


def _dies_at(count: int, case: Boundary, action: Callable[[], object]) -> bool:
    """Do something in a child that ends at the count-th call of these functions; whether it came to that."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        left = [count]
        for name in case.functions:
            _arm(builtins if name == "open" else os, name, left, before=case.before)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == DIED


def _arm(module: object, name: str, left: list[int], *, before: bool) -> None:
    real = getattr(module, name)

    def guarded(*args, **options):
        left[0] -= 1
        if not left[0] and before:
            os._exit(DIED)
        done = real(*args, **options)
        if not left[0]:
            os._exit(DIED)
        return done

    setattr(module, name, guarded)


def _save_and_retain(run_dir: Path, step: int) -> None:
    save(run_dir, step, tensors=state(seed=99))
    shelf.retain(run_dir, keep_last=2)


@rows(*cases.BOUNDARIES)
def test_a_save_that_dies_anywhere_leaves_one_that_holds(case: Boundary, measured, tmp_path):
    base = tmp_path / "base"
    for step in (10, 20, 30):
        save(base, step)
    step, kept = (30, {30}) if case.again else (40, {30, 40})
    count, died = 0, True
    while died:
        count += 1
        run_dir = shutil.copytree(base, tmp_path / f"{count}")
        died = _dies_at(count, case, lambda run_dir=run_dir: _save_and_retain(run_dir, step))
        found, skipped = newest(run_dir)
        assert found is not None and found[1].step in kept, (count, skipped)
        assert not shelf.has_damaged(run_dir), (count, skipped)
        _save_and_retain(run_dir, 50)
        assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"latest", "step-000050", f"step-{found[1].step:06d}"}, count
        assert (run_dir / "checkpoints" / "latest").read_text() == "step-000050\n"
        shutil.rmtree(run_dir)
    assert count > 2, "no boundary was met"
    measured["boundaries"] = count - 1
