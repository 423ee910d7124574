"""Order, packing and loading: every row once, the same for every cut of the batch."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data.loader import OPENS, UNTRAINED, TokenReader, TrainLoader, eval_batches
from harness.data.order import Order, shard_and_row
from harness.data.packing import Packing, best_fit, cut, spans_in_pieces
from harness.data.rows import RowTable
from harness.data.store import LocalStore

from tests.data.conftest import make_run, write_pairs

SHARDS = st.lists(st.integers(0, 400), min_size=1, max_size=12).filter(sum)
SEEDS = st.integers(0, 2**31 - 1)


class Numbered:
    """An order that tells rows by their number, shard after shard."""

    def __init__(self, shards: list[int], seed: int, window: int):
        self.shards, self.order = shards, Order(len(shards), shards.__getitem__, seed, window)
        self.before = np.cumsum([0, *shards])
        self.num_rows = sum(shards)

    def rows(self, first: int, count: int) -> np.ndarray:
        shards, rows = shard_and_row(self.order.rows(first, count))
        return self.before[shards] + rows

    def position(self, row: int, *, epoch: int) -> int:
        shard = int(np.searchsorted(self.before, row, side="right")) - 1
        return self.order.position(shard, row - int(self.before[shard]), epoch=epoch)


def ordered(shards: list[int], *, seed: int = 0, window: int = 3) -> Numbered:
    return Numbered(shards, seed, window)


@given(shards=SHARDS, seed=SEEDS, window=st.integers(1, 14), epoch=st.integers(0, 50))
@settings(max_examples=80, deadline=None)
def test_an_epoch_is_a_permutation(shards, seed, window, epoch):
    order = ordered(shards, seed=seed, window=window)
    rows = order.rows(epoch * order.num_rows, order.num_rows)
    assert np.array_equal(np.sort(rows), np.arange(order.num_rows))


@given(shards=SHARDS, seed=SEEDS, start=st.integers(0, 9000), count=st.integers(1, 300), split=st.integers(0, 300))
@settings(max_examples=80, deadline=None)
def test_any_cursor_continues_the_same_sequence(shards, seed, start, count, split):
    order, split = ordered(shards, seed=seed), min(split, count)
    parts = [order.rows(start, split), order.rows(start + split, count - split)]
    assert np.array_equal(order.rows(start, count), np.concatenate(parts))


@given(shards=SHARDS, seed=SEEDS, window=st.integers(1, 5), data=st.data())
@settings(max_examples=80, deadline=None)
def test_every_row_knows_its_position(shards, seed, window, data):
    order = ordered(shards, seed=seed, window=window)
    position = data.draw(st.integers(0, 3 * order.num_rows - 1))
    row = int(order.rows(position, 1)[0])
    assert order.position(row, epoch=position // order.num_rows) == position


@given(shards=SHARDS, seed=SEEDS, window=st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_few_shards_are_needed_at_a_time(shards, seed, window):
    """From its first row to its last a shard is in use, and never more of them than a window holds."""
    order = ordered(shards, seed=seed, window=window)
    shard_of = np.repeat(np.arange(len(shards)), shards)[order.rows(0, order.num_rows)]
    in_use = np.zeros(order.num_rows, int)
    for shard in np.unique(shard_of):
        places = np.flatnonzero(shard_of == shard)
        in_use[places[0] : places[-1] + 1] += 1
    assert in_use.max() <= window


def test_epochs_and_seeds_differ():
    one, two = (ordered([100]).rows(first, 100) for first in (0, 100))
    assert not np.array_equal(one, two)
    assert not np.array_equal(one, ordered([100], seed=1).rows(0, 100))
    shards = [np.repeat(np.arange(9), 10)[ordered([10] * 9, window=1).rows(first, 90)][::10].tolist() for first in (0, 90)]
    assert shards[0] != shards[1] and shards[0] != sorted(shards[0]), "the shards are shuffled too"


def test_a_billion_rows_cost_nothing():
    order = ordered([10**6] * 1000, seed=3, window=16)
    assert len(set(order.rows(10**9 - 5, 10).tolist())) == 10


@given(sizes=st.lists(st.integers(1, 64), min_size=1, max_size=200))
@settings(max_examples=60, deadline=None)
def test_packing_loses_nothing_and_never_overflows(sizes):
    rows = best_fit(np.asarray(sizes), 64)
    assert sorted(piece for row in rows for piece in row) == list(range(len(sizes)))
    used = [sum(sizes[piece] for piece in row) for row in rows]
    assert max(used) <= 64
    assert len(rows) == 1 or sum(sorted(used)[:2]) > 64, "no two rows would fit into one"


def test_packing_goes_from_the_longest_to_the_shortest():
    assert len(best_fit(np.asarray([24, 40, 24, 40, 14, 50]), 64)) == 3


@given(lengths=st.lists(st.integers(2, 200), min_size=1, max_size=30), length=st.integers(8, 64), how=st.sampled_from(["cut", "truncate", "drop"]))
@settings(max_examples=60, deadline=None)
def test_long_documents(lengths, length, how):
    pieces, lost = cut(np.asarray(lengths), length, how)
    kept = {n: (pieces[pieces[:, 0] == n, 2] - pieces[pieces[:, 0] == n, 1]).sum() for n in range(len(lengths))}
    for number, size in enumerate(lengths):
        expected = {"cut": size, "truncate": min(size, length), "drop": size if size <= length else 0}[how]
        assert kept[number] == expected
    assert (pieces[:, 2] - pieces[:, 1]).max(initial=0) <= length
    assert lost.sum() == (0 if how == "cut" else sum(size > length for size in lengths))


def test_the_first_token_of_a_piece_is_never_trained():
    pieces = np.asarray([[0, 0, 8], [0, 8, 16], [1, 0, 4]])
    spans = np.asarray([[0, 0, 3], [0, 6, 10], [1, 1, 4]])
    owner, first, last = spans_in_pieces(pieces, spans, 2)
    assert np.bincount(owner, weights=last - first).tolist() == [2 + 2, 1, 3]
    assert list(zip(owner.tolist(), first.tolist(), last.tolist(), strict=True)) == [(0, 1, 3), (0, 6, 8), (1, 9, 10), (2, 1, 4)]


@pytest.fixture(scope="module", params=["none", "best_fit"])
def table(request, prepared) -> RowTable:
    return RowTable.build(prepared / "train", Packing(32, request.param, "cut"))


def test_counts_from_the_index_are_what_the_batches_hold(table):
    reader = TokenReader(table)
    ids = table.ids(np.arange(table.num_rows))
    batch = reader.batch(ids, first_row=0)
    assert np.array_equal((batch.labels != UNTRAINED).sum(1), table.trained_tokens(ids))
    assert (batch.labels[batch.position_ids == 0] == UNTRAINED).all()
    trained = batch.labels != UNTRAINED
    assert (batch.labels[trained] == batch.input_ids[trained]).all()
    assert ((batch.position_ids == 0) == (batch.marks & OPENS)).all(), "positions restart where a piece begins"


@pytest.mark.parametrize("ranks, micro_batch", [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_every_cut_reads_the_same_global_batches(table, ranks, micro_batch):
    def first_batches(rank: int, size: int, micro: int, start: int) -> list:
        loader = TrainLoader(table, table.order(seed=5, window_shards=2), dp_rank=rank, dp_size=size, micro_batch=micro, global_rows=8, start=start)
        batches = [batch for batch, _ in zip(loader, range(4), strict=False)]
        loader.close()
        return batches

    whole = first_batches(0, 1, 8, 3)
    parts = [first_batches(rank, ranks, micro_batch, 3) for rank in range(ranks)]
    for number, batch in enumerate(whole):
        rows = {m.first_row: m for part in parts for m in part[number].micro_batches}
        assert sorted(rows) == list(range(0, 8, micro_batch))
        joined = np.concatenate([rows[first].input_ids for first in sorted(rows)])
        assert np.array_equal(joined, batch.micro_batches[0].input_ids)
        assert {part[number].trained_tokens for part in parts} == {batch.trained_tokens}
        assert batch.trained_tokens == int((batch.micro_batches[0].labels != UNTRAINED).sum())


def test_the_last_batch_is_filled_with_rows_without_trained_tokens(table):
    loader = TrainLoader(table, table.order(seed=5, window_shards=2), dp_rank=0, dp_size=1, micro_batch=8, global_rows=8, start=0, total_rows=11)
    first, last = list(loader)
    loader.close()
    assert (first.rows, last.rows) == (8, 3)
    assert (last.micro_batches[0].labels[3:] == UNTRAINED).all()


@pytest.mark.parametrize("ranks, micro_batch", [(1, 1), (2, 3), (4, 2), (3, 7)])
def test_evaluation_sees_every_row_once_with_equal_work(table, ranks, micro_batch):
    batches = [list(eval_batches(table, dp_rank=rank, dp_size=ranks, micro_batch=micro_batch, errors=[])) for rank in range(ranks)]
    assert len({len(b) for b in batches}) == 1
    trained = sum(int((b.labels != UNTRAINED).sum()) for part in batches for b in part)
    assert trained == sum(table.summary.trained)


def test_a_loader_that_fails_says_so_where_it_is_used(table, monkeypatch):
    monkeypatch.setattr(TrainLoader, "global_batch", lambda *_: 1 / 0)
    loader = TrainLoader(table, table.order(seed=5, window_shards=2), dp_rank=0, dp_size=1, micro_batch=8, global_rows=8)
    with pytest.raises(ZeroDivisionError):
        next(iter(loader))
    loader.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_without_a_word_is_not_waited_for(table, monkeypatch):
    def put(self, item):
        raise SystemExit  # threads end by it and say nothing

    monkeypatch.setattr(TrainLoader, "_put", put)
    loader = TrainLoader(table, table.order(seed=5, window_shards=2), dp_rank=0, dp_size=1, micro_batch=8, global_rows=8)
    filler = next(iter(loader))
    assert "has died without a word" in str(loader.error) and not (filler.micro_batches[0].labels != UNTRAINED).any()
    loader.close()


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """The same pairs in shards of two sizes."""
    from harness.data import prepare as module

    folders = []
    for size in (700, 4000):
        folder = tmp_path_factory.mktemp(f"shards-{size}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "SHARD_TEXT_BYTES", size)
            run = make_run(folder, train={"path": str(write_pairs(folder / "pairs.jsonl", 150))}, shape="prompt_completion", num_processes=1)
            module.prepare(run, progress=False)
        folders.append(folder / "data" / "train")
    return folders


@given(
    which=st.integers(0, 1), length=st.sampled_from([8, 16, 24, 64, 200]), packing=st.sampled_from(["none", "best_fit"]), seed=SEEDS, window=st.integers(1, 9),
    ranks=st.integers(1, 64), micro_batch=st.integers(1, 4), accumulation=st.integers(1, 3), start=st.integers(0, 2000),
)
@settings(max_examples=60, deadline=None)
def test_every_world_reads_the_same_epochs(many_shards, which, length, packing, seed, window, ranks, micro_batch, accumulation, start):
    """Each row of two epochs once, whatever the ranks, the micro-batch and the row at which they begin."""
    table = RowTable.build(many_shards[which], Packing(length, packing, "cut"))
    order = table.order(seed=seed, window_shards=window)
    total = 2 * table.num_rows
    rows, reader = ranks * micro_batch * accumulation, TokenReader(table)
    loaders = [
        TrainLoader(table, order, dp_rank=rank, dp_size=ranks, micro_batch=micro_batch, global_rows=rows, start=start, total_rows=total) for rank in range(ranks)
    ]
    expected = reader.batch(order.rows(0, total), first_row=0).tokens
    start, trained = start % total, 0
    seen = []
    for position in range(start, min(total, start + 3 * rows), rows):
        parts = [loader.global_batch(reader, position) for loader in loaders]
        found = {micro.first_row: micro.tokens for part in parts for micro in part.micro_batches}
        assert sorted(found) == list(range(0, rows, micro_batch)) and len({part.trained_tokens for part in parts}) == 1
        seen.append(np.concatenate([found[first] for first in sorted(found)])[: parts[0].rows])
        trained += parts[0].trained_tokens
    seen = np.concatenate(seen)
    assert np.array_equal(seen, expected[start : start + len(seen)])
    ids = order.rows(0, total)
    assert np.array_equal(np.sort(ids[: table.num_rows]), np.sort(table.ids(np.arange(table.num_rows))))
    assert table.num_rows < 10 or not np.array_equal(ids[: table.num_rows], ids[table.num_rows :]), "two epochs differ"
    assert trained == int(table.trained_tokens(ids[start : start + len(seen)]).sum())


def test_whoever_waits_for_a_shard_of_one_set_keeps_no_other_set_from_being_read(prepared):
    """The lock that `functools.cached_property` of Python 3.11 holds for all objects of a class would."""
    asked, may_come = threading.Event(), threading.Event()

    class Late(LocalStore):
        def hold(self, wanted):
            if wanted.name.endswith(".arrow"):
                asked.set()
                assert may_come.wait(60)
            return super().hold(wanted)

    packing = Packing(32, "best_fit", "cut")
    late, near = (RowTable.open(store, packing, local=None) for store in (Late(prepared / "train"), LocalStore(prepared / "validation")))
    waiting = threading.Thread(target=lambda: late.shard(0).tokens)
    reading = threading.Thread(target=lambda: near.shard(0).tokens, daemon=True)
    waiting.start()
    assert asked.wait(60)
    reading.start()
    reading.join(20)
    is_read = not reading.is_alive()
    may_come.set()
    waiting.join()
    assert is_read
