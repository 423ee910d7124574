"""How an attempt ended, and what happened on the way."""

from __future__ import annotations

import json

import pytest

from harness.formats import ledger
from harness.formats import manifest
from harness.formats.manifest import LaterVersion, Manifest, ManifestError, ParameterEntry, SliceFile, coverage_problems, read_manifest, write_manifest
from harness.formats.outcome import Outcome, last_step, read_outcome, write_outcome


def test_the_last_outcome_stands(tmp_path):
    assert read_outcome(tmp_path) is None
    for outcome in (Outcome("stopped", 75, "asked", 4, 1), Outcome("done", 0, "finished", 9, 2)):
        write_outcome(tmp_path, outcome)
    assert read_outcome(tmp_path) == outcome
    (tmp_path / "outcome.json").write_text('{"state": "do')
    assert read_outcome(tmp_path) is None


def test_the_last_step_survives_a_line_cut_short(tmp_path):
    assert last_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 41}) + "\n" + json.dumps({"step": 42}) + "\n" + '{"step": 4')
    assert last_step(tmp_path) == 42


def test_events_come_back_in_order_without_the_broken_one(tmp_path):
    ledger.append(tmp_path, "start", attempt=1)
    ledger.append(tmp_path, "save", step=3)
    with open(tmp_path / ledger.NAME, "a", encoding="utf-8") as stream:
        stream.write('{"kind": "sa')
    assert [(event["kind"], event.get("step")) for event in ledger.read(tmp_path)] == [("start", None), ("save", 3)]
    ledger.append(tmp_path, "resume", step=3)
    assert [event["kind"] for event in ledger.read(tmp_path)] == ["start", "save", "resume"], "it does not swallow the next one"
    with pytest.raises(AssertionError):
        ledger.append(tmp_path, "holiday")


def _manifest(**changes) -> Manifest:
    values = {
        "step": 7, "rows_consumed": 28, "adam_step": 6, "data_fingerprint": "f", "parameters": {"w": ParameterEntry(shape=(2, 3), dtype="bf16")},
        "loss_scale": {"cur_scale": 1024.0, "cur_iter": 7.0},
        "files": (SliceFile(file="a", bytes=1, digest="d", slices=(("w", 0, 4),)), SliceFile(file="b", bytes=1, digest="d", slices=(("w", 4, 2),))),
    }
    return Manifest(**values | changes)


def test_a_manifest_comes_back_as_it_was(tmp_path):
    write_manifest(tmp_path, _manifest())
    assert read_manifest(tmp_path) == _manifest()


@pytest.mark.parametrize("spoil, told", [
    (lambda text: text.replace('"step": 7', '"step": 8'), "was changed"),
    (lambda text: text[:-9], "cannot be read"),
    (lambda text: "[]", "cannot be read"),
])
def test_a_spoilt_manifest_is_told(tmp_path, spoil, told):
    write_manifest(tmp_path, _manifest())
    path = tmp_path / "manifest.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ManifestError, match=told):
        read_manifest(tmp_path)


def test_a_later_version_is_refused(tmp_path):
    write_manifest(tmp_path, _manifest(version=manifest.VERSION + 1))
    with pytest.raises(LaterVersion, match=f"version {manifest.VERSION + 1}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("slices, told", [
    ((("w", 0, 6),), None), ((("w", 0, 4),), "up to element 4 of 6"), ((("w", 1, 5),), "gap at element 0"),
    ((("w", 0, 6), ("w", 2, 2)), "stored twice"), ((("w", 0, 6), ("v", 0, 1)), "unknown parameter v"),
])
def test_every_element_is_stored_once(slices, told):
    problems = coverage_problems(_manifest().parameters, (SliceFile(file="a", bytes=1, digest="d", slices=slices),))
    assert bool(problems) == bool(told) and all(told in problem for problem in problems)
