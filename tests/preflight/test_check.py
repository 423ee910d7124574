"""What is refused before a model is built."""

from __future__ import annotations

import json

import pytest

from harness.config.load import Loaded
from harness.config.schema import RunFile
from harness.data.prepare import prepare
from harness.errors import Refused
from harness.preflight.check import check
from tests.data.conftest import make_run


def loaded(run: RunFile, **data: object) -> Loaded:
    values = run.model_dump() | {"data": run.data.model_dump() | data}
    values |= {"engine": {"deepspeed": "zero1", "device": "cpu"}, "launch": {"ranks": 1}, "train": values["train"] | {"precision": "fp32"}}
    return Loaded(RunFile.model_validate(values), {})


def test_a_row_length_that_costs_the_answers_of_a_prepared_set(tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"prompt": f"{n} " + "word " * 60, "completion": "yes"}) + "\n" for n in range(40)))
    run = make_run(tmp_path, train={"path": str(tmp_path / "t.jsonl")}, shape="prompt_completion", sequence_length=512)
    prepare(run, progress=False)
    check(loaded(run), ranks=1, has_gpu=False)
    with pytest.raises(Refused, match="No row of 16 tokens of the train set has a trained token"):
        check(loaded(run, sequence_length=16, long_documents="truncate"), ranks=1, has_gpu=False)
    named = {"train": None, "dir": None, "sets": {"a": {"dir": run.data.dir}}, "train_tokenizer": None}
    with pytest.raises(Refused, match="of the train set has a trained token"):
        check(loaded(run, **named, sequence_length=16, long_documents="truncate"), ranks=1, has_gpu=False)
