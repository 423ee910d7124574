"""Any cut of a parameter can be read from slices of any other cut."""

from __future__ import annotations

import pytest
import torch
from tests.checkpoint.fabricate import SHAPES, save_as_ranks, state

from harness.checkpoint import read, shelf
from harness.errors import Failure
from harness.formats.manifest import KINDS


def _reader(folder):
    manifest, problems = shelf.inspect(folder)
    assert problems == []
    return read.SliceReader(folder, manifest)


@pytest.mark.parametrize("stored_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("cut", [1, 3, 10, 1000])
def test_every_cut_over_every_cut(tmp_path, stored_ranks, cut):
    tensors = state()
    reader = _reader(save_as_ranks(tmp_path, tensors, ranks=stored_ranks))
    for kind in KINDS:
        for name, flat in tensors[kind].items():
            parts = [
                reader.read(kind, name, begin, min(cut, flat.numel() - begin)) for begin in range(0, flat.numel(), cut)
            ]
            assert torch.equal(torch.cat(parts), flat)


def test_few_open_files_are_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "_MAX_OPEN_FILES", 1)
    tensors = state()
    reader = _reader(save_as_ranks(tmp_path, tensors, ranks=5))
    for name, flat in tensors["master"].items():
        assert torch.equal(reader.read("master", name, 0, flat.numel()), flat)


def test_what_is_read_is_a_copy(tmp_path):
    reader = _reader(save_as_ranks(tmp_path, state(), ranks=2))
    reader.read("master", "wte.weight", 0, 35).zero_()
    assert reader.read("master", "wte.weight", 0, 35).abs().sum() > 0


def test_an_alias_reads_the_tied_parameter(tmp_path):
    tensors = state()
    reader = _reader(save_as_ranks(tmp_path, tensors, ranks=2, tied={"lm_head.weight": "wte.weight"}))
    assert torch.equal(reader.read("master", "lm_head.weight", 3, 30), tensors["master"]["wte.weight"][3:33])


@pytest.mark.parametrize(
    ("name", "offset", "length"),
    [("wte.weight", 30, 6), ("wte.weight", 35, 1), ("absent", 0, 1), ("wte.weight", -1, 2)],
)
def test_gaps_are_refused(tmp_path, name, offset, length):
    reader = _reader(save_as_ranks(tmp_path, state(), ranks=2))
    with pytest.raises(Failure, match=f"does not hold master of {name}"):
        reader.read("master", name, offset, length)


def test_unknown_kinds_are_refused(tmp_path):
    reader = _reader(save_as_ranks(tmp_path, state(), ranks=1))
    with pytest.raises(Failure, match="not 'gradient'"):
        reader.read("gradient", next(iter(SHAPES)), 0, 1)
