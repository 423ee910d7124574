"""What a step trained on and when a row was trained, against the batches that the loader gives."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from rich.console import Console

from harness.config.schema import RunFile
from harness.data.loader import TokenReader, TrainLoader
from harness.data.provenance import Provenance
from harness.data.packing import Packing
from harness.data.rows import RowTable
from harness.errors import Refused
from tests.data.conftest import make_run


@pytest.fixture
def provenance(prepared) -> Provenance:
    run = RunFile.model_validate({
        "run_dir": "unused", "model": {"path": "unused"}, "train": {"steps": 9, "global_batch_rows": 4, "seed": 6},
        "data": {"dir": str(prepared), "train": {"path": "unused"}, "sequence_length": 32},
    })
    rows = RowTable.build(prepared / "train", Packing(32, "best_fit", "cut"))
    return Provenance(str(prepared / "train"), run, {step: 4 * step for step in range(1, 9)}, fingerprint=rows.fingerprint)


@pytest.fixture
def tokenizer(prepared):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(prepared / "tokenizer")


def test_a_step_is_shown_as_the_loader_reads_it(provenance, tokenizer):
    loader = TrainLoader(provenance.table, provenance.table.order(seed=6, window_shards=16), dp_rank=0, dp_size=1, micro_batch=4, global_rows=4)
    reader = TokenReader(provenance.table)
    for step in (1, 5, 8):
        batch = loader.global_batch(reader, 4 * (step - 1))
        shown = provenance.rows_of_step(step, tokenizer)
        assert sum(row.trained_tokens for row in shown) == batch.trained_tokens
        for place, row in enumerate(shown):
            documents = [datasets.load_from_disk(provenance.table.store.url)[piece.document]["input_ids"][piece.start : piece.stop] for piece in row.pieces]
            joined = np.concatenate(documents)
            assert np.array_equal(batch.micro_batches[0].input_ids[place][: len(joined)], joined)
            assert row.pieces[0].text and all(len(piece.text) <= 60 for piece in row.pieces)
            for piece in row.pieces:
                source = json.loads(Path(piece.file).read_text().splitlines()[piece.source_row - 1])
                assert piece.text in " ".join(f"{source['prompt']} {source['completion']} <|endoftext|>".replace(" <|", "<|").split())


def test_a_row_says_in_which_steps_it_was_trained(provenance, tokenizer):
    for step in (1, 4, 8):
        for row in provenance.rows_of_step(step, tokenizer):
            assert (row.epoch, row.position, step) in provenance.steps_of_row(row.row)
    late = provenance.table.number(int(provenance.order.rows(provenance.table.num_rows - 1, 1)[0]))
    epoch, position, step = provenance.steps_of_row(late)[0]
    assert (epoch, position) == (0, provenance.table.num_rows - 1) and (step is None) == (position >= 32)


def test_what_is_not_there_is_refused(provenance, prepared):
    with pytest.raises(Refused, match="not recorded step 99"):
        provenance.rows_of_step(99, None)
    with pytest.raises(Refused, match="no row 999999"):
        provenance.steps_of_row(999999)
    with pytest.raises(Refused, match="not a prepared set"):
        Provenance(str(prepared), provenance.run, {}, fingerprint=provenance.table.fingerprint)
    with pytest.raises(Refused, match="did not train on the rows"):
        Provenance(str(prepared / "validation"), provenance.run, {}, fingerprint=provenance.table.fingerprint)


def test_square_brackets_in_text_and_names_are_shown(tmp_path, monkeypatch, capsys):
    from harness.cli.data import _show
    from harness.data.prepare import prepare

    folder = tmp_path / "[b]"
    folder.mkdir()
    rows = [{"prompt": f"[INST] q {n} [/INST]", "completion": ":smile: [bold]"} for n in range(40)]
    (folder / "a[1].jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make_run(folder, train={"path": str(folder / "a[1].jsonl")}, shape="prompt_completion", packing="none", sequence_length=64)
    monkeypatch.setenv("COLUMNS", "200")
    Console(markup=False).print(prepare(run, progress=False).render())
    table = RowTable.build(folder / "data" / "train", Packing.of(run.data))
    provenance = Provenance(str(folder / "data" / "train"), run, {1: 4}, fingerprint=table.fingerprint)
    _show(provenance, argparse.Namespace(set=str(folder / "data" / "train"), step=1), trust_code=False)
    audit, shown = capsys.readouterr().out.split("step 1", 1)
    assert "[b]/data" in audit and "[INST] q 0 [/INST]" in audit
    assert "a[1].jsonl:" in shown and shown.count("[/INST] :smile: [bold]") == 4
