"""Mixtures: shares, caps, resume at any integer, and rows that the sets' own orders give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data.loader import TokenReader, TrainLoader
from harness.data.mixture import PERIOD, MixedTable, Mixture, Share, apportion
from harness.data.order import Order, shard_and_row
from harness.data.packing import Packing
from harness.data.rows import RowTable
from tests.data.conftest import make_run, write_pairs

SETS = st.lists(
    st.tuples(st.integers(1, 400), st.floats(0.05, 5), st.one_of(st.none(), st.floats(0.2, 3.0))), min_size=1, max_size=4
)


def mixture(sets, seed: int = 0) -> Mixture:
    orders = [Order(2, [size - size // 2, size // 2].__getitem__, seed + number, 2) for number, (size, _, _) in enumerate(sets)]
    shares = [Share(str(number), weight, cap) for number, (_, weight, cap) in enumerate(sets)]
    return Mixture(orders, [size for size, _, _ in sets], shares, [2 * number for number in range(len(sets))], seed)


@given(weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_seats_follow_weights(weights):
    seats = apportion(weights, PERIOD)
    assert sum(seats) == PERIOD and min(seats) >= 1
    if all(weight / sum(weights) * PERIOD >= 1 for weight in weights):
        assert max(abs(seat - weight / sum(weights) * PERIOD) for seat, weight in zip(seats, weights, strict=True)) < 1 + 1e-9


@given(sets=SETS, seed=st.integers(0, 9), first=st.integers(0, 4000), count=st.integers(1, 1500), split=st.integers(0, 1500))
@settings(max_examples=80, deadline=None)
def test_any_cursor_continues_the_same_sequence(sets, seed, first, count, split):
    mixed = mixture(sets, seed)
    if mixed.total_rows is not None:
        first, count = first % mixed.total_rows, min(count, mixed.total_rows - first % mixed.total_rows)
    split = min(split, count)
    whole = mixed.rows(first, count)
    again = mixture(sets, seed)
    assert np.array_equal(whole, np.concatenate([again.rows(first, split), again.rows(first + split, count - split)]))


@given(sets=SETS, seed=st.integers(0, 9), count=st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_every_set_gives_its_own_order_and_never_more_than_its_cap(sets, seed, count):
    mixed = mixture(sets, seed)
    count = min(count, mixed.total_rows or count)
    ids = mixed.rows(0, count)
    shards, rows = shard_and_row(ids)
    for number, (size, _, cap) in enumerate(sets):
        own = shards // 2 == number
        expected = mixed.orders[number].rows(0, int(own.sum()))
        assert np.array_equal(expected, (shards[own] - 2 * number) << 32 | rows[own])
        assert cap is None or own.sum() <= max(1, int(cap * size))
    if mixed.total_rows == count:
        assert count == sum(max(1, int(cap * size)) for size, _, cap in sets), "every set was used up to its cap, and no further"


@given(sets=SETS, seed=st.integers(0, 9), place=st.integers(0, 3000))
@settings(max_examples=60, deadline=None)
def test_a_row_knows_where_it_stands(sets, seed, place):
    mixed = mixture(sets, seed)
    if mixed.total_rows is not None:
        place %= mixed.total_rows
    [which], [number] = mixed.draws(place, 1)
    assert mixed.position(int(which), int(number)) == place


def test_shares_are_those_of_the_weights_in_every_period():
    sets, _ = mixture([(10**6, 3.0, None), (10**6, 1.0, None)]).draws(0, 10 * PERIOD)
    assert np.bincount(sets).tolist() == [10 * PERIOD * 3 // 4, 10 * PERIOD // 4]
    assert np.abs(np.cumsum(sets[:200]) - np.arange(200) / 4).max() < 25, "no long runs of one set"


def test_a_cap_below_the_first_row_of_a_set_says_that_it_never_comes():
    mixed = mixture([(100, 1.0, 0.5), (100, 1.0, None)])
    assert mixed.position(0, 49) is not None and mixed.position(0, 50) is None


def test_a_mixture_is_resumed_by_an_integer_for_every_cut(tmp_path):
    tables = []
    for number in range(2):
        from harness.data.prepare import prepare

        folder = tmp_path / str(number)
        folder.mkdir()
        run = make_run(folder, train={"path": str(write_pairs(folder / "p.jsonl", 80 + 40 * number, seed=number))}, shape="prompt_completion")
        prepare(run, progress=False)
        tables.append(RowTable.build(folder / "data" / "train", Packing(32, "best_fit", "cut")))
    mixed = MixedTable(tables, [Share("a", 3.0, 1.5), Share("b", 1.0, None)])

    def batches(start: int, *, rank: int, ranks: int, micro: int, count: int):
        loader = TrainLoader(mixed, mixed.order(seed=4, window_shards=2), dp_rank=rank, dp_size=ranks, micro_batch=micro, global_rows=8, start=start)
        found = [batch for batch, _ in zip(loader, range(count), strict=False)]
        loader.close()
        return found

    whole = batches(0, rank=0, ranks=1, micro=8, count=40)
    for ranks, micro in ((2, 2), (4, 1)):
        parts = [batches(8 * 11, rank=rank, ranks=ranks, micro=micro, count=20) for rank in range(ranks)]
        for number in range(20):
            rows = {m.first_row: m.tokens for part in parts for m in part[number].micro_batches}
            assert np.array_equal(np.concatenate([rows[first] for first in sorted(rows)]), whole[11 + number].micro_batches[0].tokens)
            assert parts[0][number].trained_tokens == whole[11 + number].trained_tokens
    seen = np.concatenate([batch.micro_batches[0].tokens for batch in whole])
    reader = TokenReader(tables[0])
    own = {row.tobytes() for row in reader.batch(tables[0].ids(np.arange(tables[0].num_rows)), first_row=0).tokens}
    assert 0 < sum(row.tobytes() in own for row in seen) <= int(1.5 * tables[0].num_rows)


@pytest.mark.parametrize("name", ["a/b", "", "ä b"])
def test_names_of_sets_are_plain(name):
    from harness.config.schema import Data

    with pytest.raises(ValueError, match="pattern"):
        Data.model_validate({"sets": {name: {"dir": "x"}}})
