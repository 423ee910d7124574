"""A small prepared set."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from harness.config.schema import RunFile


def make_run(folder: Path, **data: object) -> RunFile:
    """A run file around the section `data`."""
    base = {"dir": str(folder / "data"), "sequence_length": 32, "train_tokenizer": {"vocab_size": 300}, "validation_share": 0.2}
    return RunFile.model_validate({
        "run_dir": str(folder / "run"), "data": base | data, "model": {"architecture": {"model_type": "gpt2"}},
        "train": {"steps": 1, "global_batch_rows": 8},
    })


def write_pairs(path: Path, count: int, *, seed: int = 0) -> Path:
    """Question-answer pairs of very uneven lengths."""
    draw = random.Random(seed)
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
    rows = [{"prompt": f"Q{i}: " + " ".join(draw.choices(words, k=draw.randint(1, 12))), "completion": " ".join(draw.choices(words, k=draw.randint(1, 40)))} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    from harness.data.prepare import prepare

    folder = tmp_path_factory.mktemp("prepared")
    run = make_run(folder, train={"path": str(write_pairs(folder / "pairs.jsonl", 120))}, shape="prompt_completion")
    prepare(run, progress=False)
    return folder / "data"
