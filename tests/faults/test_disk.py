"""A disk, a small one of its own, that becomes full during a save."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.checkpoint import shelf
from harness.checkpoint.disks import Disks
from harness.config.schema import RunFile
from harness.errors import Failure, Refused
from harness.train import compose
from harness.world import World
from tests.checkpoint.fabricate import commit_groups, fields, groups, save, state
from tests.end_to_end.faults import assert_same, events, launched, losses, running
from tests.faults import cases
from tests.faults.cases import Case, rows

SHAPES = {"wte.weight": (96, 64), "h.weight": (64, 64), "h.bias": (64,), "scale": ()}


@contextmanager
def disk(folder: Path, *, mib: int) -> Iterator[Path]:
    """A tmpfs, which only the administrator can mount."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root and CAP_SYS_ADMIN")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, *, but_bytes: int) -> Path:
    """Take all room but so much."""
    path = folder / "filler"
    with open(path, "wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(folder).free - but_bytes)
    return path


@rows(cases.FULL_WRITE)
def test_a_disk_that_becomes_full_while_a_file_is_written(case: Case, measured, tmp_path):
    with disk(tmp_path / "disk", mib=4) as run_dir:
        save(run_dir, 10)
        tensors = state(SHAPES, seed=1)

        def filling() -> Iterator:
            whole = groups(tensors, rank=0, ranks=1, per_group=1, shapes=SHAPES)
            yield next(whole)
            fill(run_dir, but_bytes=20_000)
            yield from whole

        def attempt(owned: Iterator) -> Path:
            return commit_groups(owned, run_dir=run_dir, fields=fields(20, SHAPES), attempt=1, world=World())

        with pytest.raises(Failure, match="step 20 was not saved; the one before it stands.\n.*No space left on device"):
            attempt(filling())
        assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"latest", "step-000010"}
        assert shelf.newest_good(run_dir)[0][1].step == 10
        (run_dir / "filler").unlink()
        assert shelf.inspect(attempt(groups(tensors, rank=0, ranks=1, shapes=SHAPES)))[1] == []


def test_what_a_killed_save_left_takes_no_room_of_the_next_attempt(tmp_path):
    with disk(tmp_path / "disk", mib=4) as run_dir:
        folder = save(run_dir, 10)
        for name in ("step-000020.tmp-1", "step-000005.deleting", "step-000010.fetched"):
            (folder.parent / name).mkdir()
            (folder.parent / name / "rank-00000-000.safetensors").write_bytes(bytes(1 << 20))
        run = RunFile.model_validate({"run_dir": str(run_dir), "data": {"dir": "unused"}, "model": {"path": "unused"}, "train": {"steps": 1}})
        engine = SimpleNamespace(parameters=lambda: {"w": {"shape": (1 << 16,)}})
        compose._check_room(run, engine, Disks.shared(World()))
        assert {path.name for path in folder.parent.iterdir()} == {"latest", "step-000010"}
        fill(run_dir, but_bytes=1 << 20)
        with pytest.raises(Refused, match="more checkpoints of 768.0 KiB need"):
            compose._check_room(run, engine, Disks.shared(World()))


@rows(cases.FULL_SAVE, cases.FULL_RUN)
def test_a_run_whose_disk_becomes_full(case: Case, course, fault, measured, tmp_path):
    """A little room is left for a few lines, or none at all."""
    with disk(tmp_path / "disk", mib=64) as small:
        run_dir, place = small / "run", fault(1, "save", 10)
        with running(course.run_file, run_dir, "checkpoint.keep_last=2", "launch.restarts=0") as it:
            it.until((place / "struck").exists)
            filler, struck = fill(small, but_bytes=100_000 if case is cases.FULL_SAVE else 0), time.time()
            (place / "go").touch()
            assert it.end() == 1, it.output
            measured["ended"] = time.time() - struck
        assert case.follows.split('"')[1] in it.output
        assert [event["step"] for event in events(run_dir, "save")] == [5]
        filler.unlink()
        launched(course.run_file, run_dir, "checkpoint.keep_last=2")
        assert [event["step"] for event in events(run_dir, "resume")] == [5]
        assert_same(run_dir, course.run_dir)
        assert max(losses(run_dir)) == 20
