"""Rows that are left out: the rest keeps its order, whatever the batch size, and what is said of them is true."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.checkpoint.certificate import next_rows
from harness.config.schema import RunFile
from harness.data.loader import TokenReader, TrainLoader
from harness.data.packing import Packing
from harness.data.passed import Passed
from harness.data.provenance import Provenance
from harness.data.rows import RowTable
from harness.formats import digest

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted), max_size=6)


@given(ranges=RANGES, first=st.integers(0, 70), count=st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_spans_are_the_positions_that_are_not_passed(ranges, first, count):
    passed = Passed.of(ranges)
    out = {place for begin, stop in ranges for place in range(begin, stop)}
    expected = [place for place in range(first, 200) if place not in out][:count]
    assert [place for begin, size in passed.spans(first, count) for place in range(begin, begin + size)] == expected
    assert passed.jump(first) == expected[0] and passed.covers(first) == (first in out)
    assert passed.trained(first, expected[-1] + 1) == count
    assert all(stop < begin for (_, stop), (begin, _) in zip(passed.ranges, passed.ranges[1:], strict=False)), "apart"


@pytest.fixture
def table(prepared) -> RowTable:
    return RowTable.build(prepared / "train", Packing(32, "best_fit", "cut"))


@given(ranges=RANGES, start=st.integers(0, 30), sizes=st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=3), total=st.integers(61, 90))
@settings(max_examples=30, deadline=None)
def test_batches_jump_over_them_and_the_batch_size_may_change_in_between(prepared, ranges, start, sizes, total):
    """The rows of an order without the passed positions, the last batch filled, the cursor one number."""
    table = RowTable.build(prepared / "train", Packing(32, "best_fit", "cut"))
    passed, order, reader = Passed.of(ranges), table.order(seed=5, window_shards=2), TokenReader(table)
    expected = [place for place in range(start, total) if not passed.covers(place)]
    seen, cursor, ids = [], start, order.rows(0, total)
    for turn in range(100):
        loader = TrainLoader(table, order, dp_rank=0, dp_size=1, micro_batch=4, global_rows=sizes[turn % len(sizes)], start=cursor, total_rows=total, passed=passed)
        batch = next(iter(loader), None)
        loader.close()
        if batch is None:
            break
        new = expected[len(seen) : len(seen) + batch.rows]
        assert np.array_equal(np.concatenate([micro.tokens for micro in batch.micro_batches])[: batch.rows], reader.batch(ids[new], first_row=0).tokens)
        assert batch.trained_tokens == int(table.trained_tokens(ids[new]).sum()) and (batch.first_position, batch.end) == (new[0], new[-1] + 1)
        seen, cursor = seen + new, batch.end
    assert seen == expected
    told = next_rows(order, first=start, count=min(8, len(expected)), passed=passed)
    assert told.digest == digest.of_bytes(ids[expected[:8]].astype("<i8").tobytes())


def test_what_a_step_trained_on_and_when_a_row_was_trained_know_of_them(table, prepared):
    """Steps of four rows; the third was taken back and its rows left out."""
    run = RunFile.model_validate({
        "run_dir": "unused", "model": {"path": "unused"}, "train": {"steps": 9, "global_batch_rows": 4, "seed": 6},
        "data": {"dir": str(prepared), "train": {"path": "unused"}, "sequence_length": 32},
    })
    passed = Passed.of([(8, 12)])
    provenance = Provenance(str(prepared / "train"), run, {1: 4, 2: 8, 3: 16, 4: 20}, fingerprint=table.fingerprint, passed=passed)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    assert [row.position for row in provenance.rows_of_step(3, tokenizer)] == [12, 13, 14, 15]
    numbers = [table.number(int(row)) for row in provenance.order.rows(0, 20)]
    for position in range(20):
        step = None if 8 <= position < 12 else 1 + position // 4 - (position >= 12)
        assert provenance.steps_of_row(numbers[position])[0] == (0, position, step)
