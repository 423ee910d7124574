"""What is said of data that changed between two attempts, and what appended data do to the order."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from harness import files
from harness.config.schema import RunFile
from harness.data import prepare as module
from harness.data.loader import TokenReader, TrainLoader
from harness.data.sets import open_data
from harness.errors import Refused
from harness.testing.pool import RankFailure
from harness.train.changes import FILE, Changes, describe
from harness.train.progress import Progress
from tests.data.conftest import make_run, write_pairs


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunFile:
    """A run on two files, prepared."""
    monkeypatch.setattr(module, "SHARD_TEXT_BYTES", 1500)
    write_pairs(tmp_path / "a.jsonl", 40)
    made = make_run(tmp_path, train={"path": str(tmp_path / "*.jsonl")}, shape="prompt_completion", num_processes=1)
    made.run_path.mkdir()
    module.prepare(made, progress=False)
    return made


def checkpoint(run: RunFile, *, rows: int) -> tuple:
    data = open_data(run)
    Changes.since(run, data, None).accept(Progress())
    return run.run_path / "checkpoints" / "step-000004", SimpleNamespace(data_fingerprint=data.train.fingerprint, state={"rows": rows, "first_row": 0})


def again(run: RunFile, **data: object) -> RunFile:
    return RunFile.model_validate(run.model_dump() | {"data": run.data.model_dump() | data})


def test_the_same_data_go_on(run):
    found = checkpoint(run, rows=16)
    changes = Changes.since(run, open_data(run), found)
    assert not changes.appended and changes.first_row(found) == 0


@pytest.mark.parametrize("change, told", [({"sequence_length": 24}, "packing of train was"), ({"validation_share": 0.4}, "rows and has")])
def test_another_setting_is_named(run, change, told):
    found, other = checkpoint(run, rows=16), again(run, **change)
    module.prepare(other, progress=False)
    with pytest.raises(Refused, match=told):
        Changes.since(other, open_data(other), found)


def test_other_bytes_are_named_by_shard(run, tmp_path):
    found = checkpoint(run, rows=16)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0].replace("alpha", "omega").replace("beta", "psi"), *lines[1:]]) + "\n")
    module.prepare(run, progress=False)
    with pytest.raises(Refused, match="hold other bytes, the first is shard-00000"):
        Changes.since(again(run, accept_appended=True), open_data(run), found)


def test_other_bytes_under_the_same_fingerprint_are_refused(run):
    found = checkpoint(run, rows=16)
    facts = files.read_json(run.run_path / FILE)
    facts["known"][found[1].data_fingerprint]["train"]["shards"]["shard-00001"] = "other"
    files.write_json(run.run_path / FILE, facts)
    with pytest.raises(Refused, match="1 of .* shards of train hold other bytes, the first is shard-00001"):
        Changes.since(again(run, accept_appended=True), open_data(run), found)


def test_appended_data_go_on_on_request_alone_and_from_a_new_epoch(run, tmp_path):
    facts = open_data(run).facts()
    more = {"train": facts["train"] | {"rows": facts["train"]["rows"] + 7, "shards": facts["train"]["shards"] | {"shard-00099": "x"}, "fingerprint": "y"}}
    found = checkpoint(run, rows=16)
    found[1].data_fingerprint = "before"
    files.write_json(run.run_path / FILE, facts)  # as before version 2
    data = SimpleNamespace(facts=lambda: more, train=SimpleNamespace(is_whole=True, fingerprint="now"))
    with pytest.raises(Refused, match=r"(?s)had \d+ shards and has .*accept_appended=true"):
        Changes.since(run, data, found)
    changes = Changes.since(again(run, accept_appended=True), data, found)
    assert changes.appended == "1 shards and 7 rows more in train" and changes.first_row(found) == 16
    progress = Progress(step=4, rows=16)
    changes.accept(progress)
    assert progress.first_row == 16 and files.read_json(run.run_path / FILE) == {"version": 2, "known": {"before": facts, "now": more}}
    assert Changes.since(again(run, accept_appended=True), data, found).appended == changes.appended, "no checkpoint of the new rows was saved"
    table = open_data(run).train
    order = table.order(seed=0, window_shards=2)
    loader = TrainLoader(table, order, dp_rank=0, dp_size=1, micro_batch=4, global_rows=4, start=16, first_row=progress.first_row)
    reader = TokenReader(table)
    assert np.array_equal(loader.global_batch(reader, 16).micro_batches[0].tokens, reader.batch(order.rows(0, 4), first_row=0).tokens)


def goes_on(run: RunFile, places: list[str]) -> tuple[str, int]:
    """Each rank has a disk of its own, and rank 0 alone the record of a run whose checkpoint knew fewer shards."""
    from harness import distributed

    mine = again(run, accept_appended=True).model_copy(update={"run_dir": places[distributed.rank()]})
    data = open_data(run)
    facts = data.facts()
    found = mine.run_path / "checkpoints" / "step-000004", SimpleNamespace(data_fingerprint="before", state={"rows": 16, "first_row": 0})
    before = {"train": facts["train"] | {"rows": facts["train"]["rows"] - 1, "shards": dict(list(facts["train"]["shards"].items())[:-1])}}
    if distributed.rank() == 0:
        files.write_json(mine.run_path / FILE, {"version": 2, "known": {"before": before}})
    changes = Changes.since(mine, data, found)
    changes.accept(Progress(step=4, rows=16))
    return changes.appended, changes.first_row(found)


def test_ranks_without_the_record_follow_rank_0(ranks2, run, tmp_path):
    places = [tmp_path / "h0", tmp_path / "h1"]
    for place in places:
        place.mkdir()
    assert ranks2.run(goes_on, run, list(map(str, places))) == [("1 shards and 1 rows more in train", 16)] * 2
    assert [(place / FILE).exists() for place in places] == [True, False]


def other_data(run: RunFile) -> None:
    from harness import distributed

    table = SimpleNamespace(fingerprint=f"of rank {distributed.rank()}", is_whole=False)
    Changes.since(run, SimpleNamespace(train=table), None)


def test_ranks_with_different_data_are_refused(ranks2, run):
    with pytest.raises(RankFailure, match="Rank 1 has other training data than rank 0"):
        ranks2.run(other_data, run)


def test_sets_that_came_and_went_are_named():
    one = {"fingerprint": "f", "backend": "b", "packing": {}, "rows": 3, "shards": {"shard-00000": "d"}}
    assert describe({"a": one}, {"b": one}) == "the set a is gone; the set b is new"
    assert "weight of a was 1.0 and is 2.0" in describe({"a": one | {"weight": 1.0}}, {"a": one | {"weight": 2.0}})
