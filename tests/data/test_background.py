"""Training on shards that are still being made: the same batches as from the whole set, begun before it is whole."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from harness import files
from harness.data import background, maker, workers
from harness.data import prepare as module
from harness.data.loader import TrainLoader
from harness.data.packing import Packing
from harness.data.rows import RowTable
from harness.errors import Failure, Refused
from tests.data.conftest import make_run, write_pairs

PACKING = Packing(32, "best_fit", "cut")


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """A run whose shards are made one by one, each when it is allowed."""
    monkeypatch.setattr(module, "SHARD_TEXT_BYTES", 1000)
    allowed, made, real = threading.Semaphore(0), [], maker.make_shard

    def wait_then_make(job):
        allowed.acquire()
        made.append(job.name)
        return real(job)

    monkeypatch.setattr(maker, "make_shard", wait_then_make)
    monkeypatch.setattr(workers, "cores", lambda: 1)  # of two threads the second could be the first to tell
    run = make_run(tmp_path, train={"path": str(write_pairs(tmp_path / "p.jsonl", 90))}, shape="prompt_completion", num_processes=1)
    thread = threading.Thread(target=module.prepare, args=(run,), kwargs={"progress": False}, daemon=True)
    thread.start()
    background.wait_for(lambda: (tmp_path / "data" / "validation" / "draft.json").is_file(), tmp_path / "data")
    yield run, allowed, made
    allowed.release(1000)
    thread.join(60)
    assert not thread.is_alive()


def batches(table, count: int, start: int = 0) -> list:
    loader = TrainLoader(table, table.order(seed=0, window_shards=2), dp_rank=0, dp_size=1, micro_batch=4, global_rows=4, start=start)
    found = [batch for batch, _ in zip(loader, range(count), strict=False)]
    loader.close()
    return found


def test_training_begins_on_the_first_window_and_goes_on_as_if_all_had_been_there(slow, tmp_path):
    run, allowed, made = slow
    growing = background.growing(tmp_path / "data" / "train", PACKING)
    assert not growing.is_whole and growing.num_shards > 6
    allowed.release(2)
    first = batches(growing, 2)
    assert len(made) <= 3 and not growing.is_whole, "it began on the first window"
    allowed.release(1000)
    rest = batches(growing, 40, start=8)
    background.wait_for(lambda: growing.is_whole, tmp_path / "data")
    whole = RowTable.build(tmp_path / "data" / "train", PACKING)
    assert growing.fingerprint == whole.fingerprint and growing.num_rows == whole.num_rows
    orders = [RowTable.order(table, seed=0, window_shards=2).rows(0, 60) for table in (growing, whole)]
    assert np.array_equal(*orders), "a certificate's order, from the index alone"
    for got, expected in zip([*first, *rest], batches(whole, 42), strict=True):
        assert np.array_equal(got.micro_batches[0].tokens, expected.micro_batches[0].tokens)
        assert got.trained_tokens == expected.trained_tokens
    assert background.growing(tmp_path / "data" / "train", PACKING) is None


def test_shards_are_made_in_the_order_of_training(slow, tmp_path):
    run, allowed, made = slow
    growing = background.growing(tmp_path / "data" / "train", PACKING)
    allowed.release(1000)
    background.wait_for(lambda: growing.is_whole, tmp_path / "data")
    order = growing.order(seed=run.train.seed, window_shards=2).shards_from(0)
    assert made == [f"shard-{next(order):05d}" for _ in made]


@pytest.mark.parametrize("code, kind", [(2, Refused), (-9, Failure)])
def test_whoever_waits_hears_of_a_failure(tmp_path, code, kind):
    files.write_json(tmp_path / background.FAILED, {"code": code, "text": "no such line"})
    with pytest.raises(kind, match="no such line"):
        background.wait_for(lambda: False, tmp_path)


def test_only_what_gains_is_prepared_ahead(tmp_path, monkeypatch):
    path = write_pairs(tmp_path / "p.jsonl", 90)
    plain = {"train": {"path": str(path)}, "shape": "prompt_completion", "train_tokenizer": None, "tokenizer": "t"}
    assert not background.worth_it(make_run(tmp_path, **plain)), "little text"
    monkeypatch.setattr(background, "WORTH_BYTES", 100)
    run = make_run(tmp_path, **plain)
    assert background.worth_it(run)
    epochs = run.model_copy(update={"train": run.train.model_copy(update={"steps": None, "epochs": 1.0})})
    assert not background.worth_it(epochs), "a length in epochs needs all rows"
    packed = path.with_suffix(".jsonl.gz")
    packed.write_bytes(b"x" * 200)
    assert not background.worth_it(make_run(tmp_path, **(plain | {"train": {"path": str(packed)}}))), "a compressed file cannot be cut"


def test_a_process_of_its_own_prepares_and_tells_what_is_wrong(tmp_path):
    run = make_run(tmp_path, train={"path": str(write_pairs(tmp_path / "p.jsonl", 90))}, shape="prompt_completion")
    background.start(run)
    table = background.growing(tmp_path / "data" / "train", PACKING) or RowTable.build(tmp_path / "data" / "train", PACKING)
    assert table.num_rows > 0
    background.wait_for(lambda: not (tmp_path / "data" / background.RUN).exists(), tmp_path / "data")  # until that process has ended
    broken = make_run(tmp_path, train={"path": str(tmp_path / "p.jsonl")}, shape="prompt_completion", columns={"prompt": "nope"})
    with pytest.raises(Refused, match="no column 'nope'"):
        background.start(broken)
