"""A checkpoint is real or it is not there."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from pathlib import Path

import pytest
from tests.checkpoint.fabricate import SHAPES, commit_groups, fields, groups, save, save_as_ranks, state

from harness.checkpoint import commit, resume, shelf
from harness.checkpoint.disks import Disks
from harness.errors import Failure, Refused
from harness.files import digest_file, digest_text
from harness.formats.manifest import FILE_NAME, LaterVersion, Manifest, coverage_problems, read_manifest, write_manifest
from harness.world import World


def newest(run_dir: Path) -> tuple[tuple[Path, Manifest] | None, list[str]]:
    """What a run goes on from, and what it says of those that it passes over."""
    skipped: list[str] = []
    return resume.newest(run_dir, Disks.shared(World()), tell=skipped.append), skipped


def _newest_step(run_dir: Path) -> int | None:
    found, _ = newest(run_dir)
    return found[1].step if found else None


def _first_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def test_saved_checkpoint_holds_and_says_where_the_run_stood(tmp_path):
    folder = save(tmp_path, 400)
    manifest, problems = shelf.inspect(folder)
    assert problems == [] and folder.name == "step-000400"
    assert (manifest.step, manifest.rows_consumed, manifest.adam_step, manifest.world_size) == (400, 3200, 9, 1)
    assert manifest.parameters["wte.weight"].shape == (7, 5)
    assert {entry.digest for entry in manifest.files} == {digest_file(folder / entry.file) for entry in manifest.files}
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000400\n"
    assert "torch" in manifest.versions and "deepspeed" in manifest.versions


def test_numbers_that_are_not_finite_survive(tmp_path):
    said = fields(
        10, metrics={"eval/loss": float("inf"), "eval/perplexity": float("nan")}, state={"best_loss": float("inf")}
    )
    folder = commit_groups(groups(state(), rank=0, ranks=1), run_dir=tmp_path, fields=said, attempt=1, world=World())
    manifest, problems = shelf.inspect(folder)
    assert problems == [] and manifest.metrics["eval/loss"] == manifest.state["best_loss"] == float("inf")
    assert manifest.metrics["eval/perplexity"] != manifest.metrics["eval/perplexity"]


def test_no_checkpoints_is_no_error(tmp_path):
    assert newest(tmp_path) == shelf.newest_good(tmp_path) == (None, [])
    assert not shelf.has_damaged(tmp_path)


def _truncate(folder):
    path = _first_file(folder)
    os.truncate(path, path.stat().st_size - 4)


def _flip_bit(folder):
    path = _first_file(folder)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _flip_manifest(folder):
    path = folder / FILE_NAME
    path.write_text(path.read_text().replace('"rows_consumed": 160', '"rows_consumed": 161'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncate, "bytes instead of"),
        (_flip_bit, "was changed since"),
        (lambda folder: _first_file(folder).unlink(), "is missing"),
        (lambda folder: (folder / FILE_NAME).unlink(), "manifest.json is missing"),
        (lambda folder: os.truncate(folder / FILE_NAME, 30), "cannot be read"),
        (_flip_manifest, "manifest.json was changed"),
    ],
)
def test_damage_falls_back_to_the_one_before_and_keeps_the_evidence(tmp_path, damage, reason):
    save(tmp_path, 10)
    last = save(tmp_path, 20)
    damage(last)
    found, skipped = newest(tmp_path)
    assert found[1].step == 10
    assert len(skipped) == 1 and reason in skipped[0] and "step-000020" in skipped[0]
    assert last.with_name("step-000020.damaged").is_dir() and not last.exists()
    assert shelf.has_damaged(tmp_path)


def test_looking_changes_nothing(tmp_path):
    last = save(tmp_path, 20)
    _flip_bit(last)
    found, skipped = shelf.newest_good(tmp_path)
    assert found is None and len(skipped) == 1 and last.is_dir()


def _break(folder: Path) -> None:
    """A file that the kernel answers with EIO, as a broken disk does."""
    (folder / FILE_NAME).rename(folder.parent / "kept")
    (folder / FILE_NAME).symlink_to("/proc/self/mem")


def _break_tensors(folder: Path) -> None:
    manifest, path = read_manifest(folder), _first_file(folder)
    files = tuple(entry.model_copy(update={"bytes": 0}) if entry.file == path.name else entry for entry in manifest.files)
    write_manifest(folder, manifest.model_copy(update={"files": files}))
    path.unlink()
    path.symlink_to("/proc/self/mem")


@pytest.mark.parametrize("spoil", [_break, _break_tensors])
def test_what_the_disk_does_not_give_is_no_damage(tmp_path, monkeypatch, spoil):
    monkeypatch.setattr(shelf, "RETRY_S", 0.01)
    save(tmp_path, 10)
    last = save(tmp_path, 20)
    spoil(last)
    for look in (newest, shelf.newest_good):
        with pytest.raises(Failure, match="step-000020 cannot be read, and may be whole: .*Input/output error.* It was left as it is."):
            look(tmp_path)
    assert [step for step, _ in shelf.committed(tmp_path)] == [20, 10] and not shelf.has_damaged(tmp_path)


def test_a_disk_that_falters_is_asked_again(tmp_path):
    last = save(tmp_path, 20)
    _break(last)
    threading.Timer(shelf.RETRY_S / 4, lambda: (last.parent / "kept").replace(last / FILE_NAME)).start()
    assert _newest_step(tmp_path) == 20


def test_the_same_step_damaged_twice_keeps_both(tmp_path):
    for _ in range(2):
        _flip_bit(save(tmp_path, 20))
        with pytest.raises(Refused, match="Every checkpoint of this run is damaged"):
            newest(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").glob("*.damaged*")} == {
        "step-000020.damaged",
        "step-000020.damaged-2",
    }


class Killed(BaseException):
    """What kill -9 looks like from inside: nothing after it runs."""


def test_killed_while_writing_leaves_the_one_before(tmp_path):
    save(tmp_path, 10)

    def dying():
        yield next(groups(state(), rank=0, ranks=1))
        raise Killed

    with pytest.raises(Killed):
        commit_groups(dying(), run_dir=tmp_path, fields=fields(20), attempt=3, world=World())
    found, skipped = newest(tmp_path)
    assert found[1].step == 10 and skipped == ["step-000020.tmp-3 was not finished"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000010\n"


def test_killed_before_the_rename_leaves_the_one_before(tmp_path, monkeypatch):
    save(tmp_path, 10)
    monkeypatch.setattr(commit.os, "rename", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        save(tmp_path, 20)
    monkeypatch.undo()
    assert _newest_step(tmp_path) == 10


def test_killed_between_rename_and_marker_counts_as_saved(tmp_path, monkeypatch):
    save(tmp_path, 10)
    monkeypatch.setattr(commit, "write_text", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        save(tmp_path, 20)
    assert _newest_step(tmp_path) == 20


def test_killed_between_the_two_renames_of_a_second_save_loses_nothing(tmp_path, monkeypatch):
    save(tmp_path, 10)
    rename = os.rename

    def one_rename(source, target):
        rename(source, target)
        raise Killed

    monkeypatch.setattr(commit.os, "rename", one_rename)
    with pytest.raises(Killed):
        save(tmp_path, 10, tensors=state(seed=5))
    monkeypatch.undo()
    assert _newest_step(tmp_path) == 10


def test_saving_a_step_again_replaces_it(tmp_path):
    before = {entry.digest for entry in shelf.inspect(save(tmp_path, 10))[0].files}
    after = {entry.digest for entry in shelf.inspect(save(tmp_path, 10, tensors=state(seed=5)))[0].files}
    assert before != after and len(list((tmp_path / "checkpoints").glob("step-*"))) == 1


def test_failure_to_write_is_reported_and_leaves_nothing(tmp_path):
    save(tmp_path, 10)

    def full():
        yield next(groups(state(), rank=0, ranks=1))
        raise OSError(28, "No space left on device")

    with pytest.raises(Failure, match="rank 0: OSError.*No space left"):
        commit_groups(full(), run_dir=tmp_path, fields=fields(20), attempt=1, world=World())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000010"]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    first = save(tmp_path, 10)
    needed = 12 * sum(math.prod(shape) for shape in SHAPES.values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(commit.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(Failure, match=r"step 20 was not saved; the one before it stands.\n  1 more checkpoints of .* are free"):
        save(tmp_path, 20)
    assert sorted(path.name for path in first.parent.iterdir()) == ["latest", "step-000010"] and shelf.inspect(first)[1] == []
    parameters = {name: {"shape": shape} for name, shape in SHAPES.items()}
    monkeypatch.setattr(commit.shutil, "disk_usage", lambda _: usage._replace(free=2 * needed))
    assert commit.room_problem(tmp_path, parameters, checkpoints=3) == "", "one of the three is there already"
    assert "3 more checkpoints" in commit.room_problem(tmp_path, parameters, checkpoints=4)
    assert commit.room_problem(tmp_path / "not" / "there", parameters, checkpoints=2) == ""


def test_a_parameter_that_is_not_stored_whole_is_not_committed(tmp_path):
    with pytest.raises(Failure, match="wte.weight is stored up to element 18 of 35"):
        commit_groups(groups(state(), rank=0, ranks=2), run_dir=tmp_path, fields=fields(20), attempt=1, world=World())
    assert _newest_step(tmp_path) is None


def test_overlaps_and_unknown_names_are_problems(tmp_path):
    manifest, _ = shelf.inspect(save(tmp_path, 10))
    assert any("stored twice" in text for text in coverage_problems(manifest.parameters, manifest.files * 2))
    fewer = {name: entry for name, entry in manifest.parameters.items() if name != "h.bias"}
    assert any("unknown parameter h.bias" in text for text in coverage_problems(fewer, manifest.files))


def test_a_manifest_of_version_1_is_read(tmp_path):
    """It knew of no disks, and so all files are to be there."""
    folder = save(tmp_path, 10)
    content = json.loads((folder / "manifest.json").read_text())
    del content["digest"], content["disks"]
    content["config_fingerprint"] = ""
    for entry in content["files"]:
        del entry["disk"]
    content["version"] = 1
    digest = digest_text(json.dumps(content, sort_keys=True, separators=(",", ":")))
    (folder / "manifest.json").write_text(json.dumps({"digest": digest, **content}))
    manifest, problems = shelf.inspect(folder)
    assert problems == [] and manifest.disks == () and manifest.version == 1
    (folder / manifest.files[0].file).unlink()
    assert shelf.inspect(folder)[1] == [f"{manifest.files[0].file} is missing"]


def test_a_later_version_is_refused_and_left_as_it_is(tmp_path):
    save(tmp_path, 10)
    last = save(tmp_path, 20)
    later = read_manifest(last)
    write_manifest(last, later.model_copy(update={"version": later.version + 1}))
    with pytest.raises(LaterVersion):
        read_manifest(last)
    for look in (newest, shelf.newest_good):
        with pytest.raises(Refused, match=rf"by a later version .* has version {later.version + 1}, this harness reads up to {later.version}"):
            look(tmp_path)
    assert [step for step, _ in shelf.committed(tmp_path)] == [20, 10]


def test_retention_keeps_the_newest_and_the_best_and_clears_leftovers(tmp_path):
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-000045.tmp-1").mkdir()
    damaged = tmp_path / "checkpoints" / "step-000044.damaged"
    damaged.mkdir()
    gone = shelf.retain(tmp_path, keep_last=2, best_step=20)
    assert [step for step, _ in shelf.committed(tmp_path)] == [50, 40, 20]
    assert [path.name for path in gone] == ["step-000030", "step-000010"]
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"latest", "step-000050", "step-000040", "step-000020", damaged.name}


def test_steps_beyond_six_digits_stay_in_order(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert _newest_step(tmp_path) == 1_000_000


def test_manifest_is_readable_by_eye_and_without_torch(tmp_path):
    text = (save(tmp_path, 10) / FILE_NAME).read_text()
    assert text.startswith('{\n"digest": "') and all(name in text for name in SHAPES)


def test_steps_that_are_kept_for_good_outlive_retention(tmp_path):
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step)
    shelf.retain(tmp_path, keep_last=1, keep_every_steps=20)
    assert [step for step, _ in shelf.committed(tmp_path)] == [50, 40, 20]


def test_a_run_without_evaluations_has_no_best_to_look_for(tmp_path, monkeypatch):
    """So that no save reads the manifests of all that are kept."""
    folder = save_as_ranks(tmp_path, state(), ranks=1, step=10, metrics={"eval/loss": 3.0})
    _break(folder)
    monkeypatch.setattr(shelf, "RETRY_S", 0.01)
    assert shelf.best(tmp_path, 0) is None and shelf.best(tmp_path, 10) == 10
    with pytest.raises(Failure, match="Input/output error"):
        shelf.retain(tmp_path, keep_last=1, best_step=40)


def test_while_the_newest_best_could_not_be_saved_the_one_before_it_stays(tmp_path):
    """Its evaluation counts as the run's best, and there is no checkpoint of it."""
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (50, 2.6), (60, None)):
        save_as_ranks(tmp_path, state(), ranks=1, step=step, metrics={} if loss is None else {"eval/loss": loss})
    assert shelf.best(tmp_path, 40) == 20 and shelf.best(tmp_path, 30) == 30
    shelf.retain(tmp_path, keep_last=1, best_step=40)
    assert [step for step, _ in shelf.committed(tmp_path)] == [60, 20]
    (tmp_path / "checkpoints" / "step-000020" / FILE_NAME).write_text("{")
    assert shelf.best(tmp_path, 40) is None
